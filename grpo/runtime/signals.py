"""Asked to stop: SIGTERM or SIGINT set a flag, and the run ends at the next safe point, saved, with code 75.

Python's own handlers wait for the main thread, which may be in a collective for a long time; here a thread reads the
wake-up pipe instead. The flag of one rank reaches all with the step's table (scoring.gather), so that all leave
at the same place. What a launcher sends because another rank died is no request: the rank that is gone is named.

exit.json holds the worker's own exit code, which torchrun turns into 1; the launch scripts return it.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

from grpo.errors import EXIT_PREEMPTED, warn
from grpo.runtime.heartbeat import Heartbeat

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 1.0  # a terminal and a launcher may both pass on one Ctrl-C


class StopRequest:
    """Whether this rank was asked to stop, and how many seconds are left for it."""

    def __init__(self, heartbeat: Heartbeat, output_dir: Path, grace_s: float):
        """Listen from now on. Call from the main thread."""
        self.heartbeat = heartbeat
        self.output_dir = output_dir
        self.grace_s = grace_s
        self.training = False  # before the first step there is nothing to save: leave at once
        self.asked_at: float | None = None
        self.name = ""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked_at is not None

    def pulse(self) -> bool:
        """Note a piece of work done; True when it should be the last."""
        self.heartbeat.beat()
        return self.asked

    def seconds_left(self) -> float:
        """Of the grace time; infinite where nobody asked."""
        return math.inf if self.asked_at is None else self.asked_at + self.grace_s - time.monotonic()

    def _listen(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 16):
                if number in SIGNALS:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self.heartbeat.stalled:
            return  # the launcher tidies up after the first rank that ended; this one ends by itself, with its code
        if self.asked_at is not None:
            if now - self.asked_at >= SAME_REQUEST_S:
                os._exit(128 + number)
            return
        self.name = signal.Signals(number).name
        self.asked_at = now
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


def forget_exit(output_dir: Path) -> None:
    """Drop an earlier run's exit.json, so that a run that crashes does not end with its code."""
    with contextlib.suppress(OSError):
        (output_dir / "exit.json").unlink()


def write_exit(output_dir: Path, code: int, reason: str) -> None:
    """Leave exit.json: the worker's own exit code and why."""
    with contextlib.suppress(OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "exit.json").write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
