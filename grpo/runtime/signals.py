"""SIGTERM and SIGINT set a flag: the run ends at the next safe point, after a checkpoint, with code 75.

Python's own handlers wait for the main thread, which may be in a collective for a long time; here a thread reads the
wake-up pipe instead. The flag of one rank reaches all ranks in the step's table (scoring.gather), so that all stop at
the same point. A signal that a launcher sends because another rank died is no stop request: the dead rank is named.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo.config.exit_file import write_exit
from grpo.errors import EXIT_BUG, EXIT_PREEMPTED, UserError, first_line, warn
from grpo.runtime.heartbeat import Heartbeat
from grpo.types import Pulse

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 1.0  # a terminal and a launcher may both pass on one Ctrl-C


@dataclass(frozen=True)
class Stopping:
    """What a part of a run that waits for others must know of its end."""

    fail: Callable[[str], None]  # one line: asks all ranks to stop at the next safe point, after a checkpoint
    pulse: Pulse = lambda: False  # called while waiting
    may_wait: Callable[[], bool] = lambda: True  # whether a run that was asked to stop has time to wait before it saves


class StopRequest:
    """Whether this rank received a signal to stop, and how much of the grace time is left."""

    def __init__(self, heartbeat: Heartbeat, output_dir: Path, grace_s: float):
        """Install the handlers. Call from the main thread."""
        self.heartbeat = heartbeat
        self.output_dir = output_dir
        self.grace_s = grace_s
        self.training = False  # before the first step there is nothing to save: end at once
        self.received_at: float | None = None
        self.failure: str | None = None  # why this rank cannot go on although no signal came
        self.name = ""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def pulse(self) -> bool:
        """Count a finished piece of work. Returns True when it should be the last one."""
        self.heartbeat.beat()
        return self.requested

    @property
    def requested(self) -> bool:
        """Whether the run should stop at the next safe point."""
        return self.received_at is not None or self.failure is not None

    def seconds_left(self) -> float:
        """What is left of the grace time; infinite without a signal."""
        return math.inf if self.received_at is None else self.received_at + self.grace_s - time.monotonic()

    def _listen(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 16):
                if number in SIGNALS:
                    self._handle(number)

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if self.heartbeat.stalled:
            return  # the launcher stops the ranks after the first one ended; the watchdog ends this one
        if self.received_at is not None:
            if now - self.received_at >= SAME_REQUEST_S:
                os._exit(128 + number)
            return
        self.name = signal.Signals(number).name
        self.received_at = now
        if gone := self.heartbeat.gone(wait_s=0.5) if number == signal.SIGTERM else []:
            for line in gone:
                warn(f"error: {line}")
            os._exit(128 + number)
        if not self.training:
            warn(f"rank {self.heartbeat.world.rank}: {self.name} before the first step: nothing to save, ending")
            write_exit(self.output_dir, EXIT_PREEMPTED, f"{self.name} before the first step")
            self.heartbeat.leave()
            os._exit(EXIT_PREEMPTED)
        warn(
            f"rank {self.heartbeat.world.rank}: {self.name}: stopping at the next safe point (once more to end at once)"
        )


@contextlib.contextmanager
def bugs_noted(output_dir: Path, rank: int) -> Iterator[None]:
    """An exception that is no UserError goes into exit.json, from the rank where it came first, and passes on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        write_exit(output_dir, EXIT_BUG, f"rank {rank}: {type(error).__name__}: {first_line(error)[:500]}", first=True)
        raise
