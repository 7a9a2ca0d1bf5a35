"""Heartbeats of the ranks, and a watchdog that names the rank that hangs.

Each rank writes one small file, output_dir/.ranks/rank_R.json, with its process, step, phase and a count that grows
with every piece of work. When a rank dies, the others' collectives fail; they read these files and report which rank
ended and in which phase. When no rank's count changes for `stall_timeout_s`, every rank that still runs prints its
stacks, names the rank that is furthest behind, and ends with code 74.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import EXIT_STALLED, warn
from grpo.runtime.distributed import World

PR_SET_PDEATHSIG = 1
ORDER = ("start", "eval", "rollout", "reward", "exchange", "logprobs", "update", "reduce", "log", "save")
ENDED = "ended"
SHOW_STACKS = signal.SIGUSR1  # works even when a rank hangs outside Python


def die_with_parent() -> None:
    """On Linux, let the kernel kill this process when its launcher dies, so that no orphan goes on writing."""
    if sys.platform == "linux" and "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Heartbeat:
    """This rank's file in the folder of heartbeats, and access to the others'."""

    def __init__(self, output_dir: Path, world: World):
        self.world = world
        self.folder = output_dir / ".ranks"
        self.step, self.phase = 0, "start"
        self.saved = ""  # progress of the save in the background
        self.stalled = False  # True: the watchdog is about to end this process
        self.count = 0
        self.lock = threading.Lock()
        self.published: dict[str, Any] = {}
        if not world.is_main:
            return
        for old_file in self.folder.glob("rank_*.json"):  # of an earlier run
            old_file.unlink(missing_ok=True)

    def __call__(self, step: int, phase: str) -> None:
        """Record this rank's step and phase, and publish them."""
        self.step, self.phase = step, phase
        self.beat()
        self.publish()

    def beat(self) -> None:
        """Count a finished piece of work: a token, a micro-batch, a score."""
        self.count += 1

    def saving(self, step: int, phase: str) -> None:
        """Record the progress of a save. Called by the thread that saves."""
        self.saved = f"{phase} of checkpoint_{step}"
        self.beat()

    def publish(self) -> None:
        """Write the file. The run goes on when it cannot be written."""
        beat = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "step": self.step,
            "phase": self.phase,
            "saving": self.saved,
            "count": self.count,
            "waits": self.world.waits.inside,
        }
        file = self.folder / f"rank_{self.world.rank}.json"
        try:
            with self.lock:
                if beat == self.published:
                    return
                self.folder.mkdir(exist_ok=True)
                file.with_suffix(".new").write_text(json.dumps(beat), encoding="utf-8")
                os.replace(file.with_suffix(".new"), file)  # atomic: other ranks never read a part of it
                self.published = beat
        except OSError:
            return

    def leave(self) -> None:
        """Publish that this rank ends normally, so that it is not reported as gone."""
        self.phase = ENDED
        self.publish()

    def where(self) -> str:
        """This rank's phase and step, for messages."""
        return f"rank {self.world.rank}, phase {self.phase}, step {self.step}"

    def read(self, rank: int) -> dict[str, Any] | None:
        """What a rank published last; None when its file cannot be read."""
        try:
            beat = json.loads((self.folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            return {"rank": rank, **beat} if {"pid", "host", "step", "phase", "count"} <= set(beat) else None
        except (OSError, ValueError, TypeError):
            return None

    def read_all(self) -> list[dict[str, Any]]:
        """What the ranks published last; without those whose file cannot be read."""
        return [beat for rank in range(self.world.size) if (beat := self.read(rank)) is not None]

    def bytes_saved(self) -> int:
        """Size of the checkpoint that is being written: progress of a large save on a slow disk."""
        total = 0
        with contextlib.suppress(OSError):  # it is being renamed
            for path in self.folder.parent.glob(".tmp-checkpoint_*/**/*"):
                total += path.stat().st_size
        return total

    def gone(self, wait_s: float = 2.0) -> list[str]:
        """One line for each rank of this host whose process ended. Waits up to wait_s for one to end."""
        deadline = time.monotonic() + wait_s
        while True:
            lines = [
                f"rank {beat['rank']} is gone, last in phase {beat['phase']}, step {beat['step']}"
                for beat in self.read_all()
                if beat["host"] == socket.gethostname()
                and beat["phase"] != ENDED
                and state_of(int(beat["pid"])) in ("gone", "Z")
                and (self.read(beat["rank"]) or beat)["phase"] != ENDED  # its last word, after `beat` was read
            ]
            if lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.1)


def state_of(pid: int) -> str:
    """State of a process of this host: "gone", or the kernel's letter (Z: zombie, T: stopped), or "?"."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "gone"
    except OSError:
        return "?"


def kill_or_show_stacks(pid: int) -> None:
    """Kill a stopped process of this host; let one that hangs outside Python print its stacks."""
    state = state_of(pid)
    if state == "T":
        os.kill(pid, signal.SIGKILL)  # a stopped process handles no other signal, and the launcher would wait for it
    elif state not in ("gone", "Z", "?"):
        os.kill(pid, SHOW_STACKS)


class Watchdog(threading.Thread):
    """Watches the counts of all ranks; when none changes for `timeout_s`, names the rank that hangs and ends.

    It counts its own ticks instead of reading the clock, so that a suspended machine is not taken for a stall.
    """

    def __init__(self, heartbeat: Heartbeat, timeout_s: float, on_stall: Callable[[str], None]):
        super().__init__(name="watchdog", daemon=True)
        self.heartbeat = heartbeat
        self.timeout_s = timeout_s
        self.tick_s = min(2.0, timeout_s / 10)
        self.on_stall = on_stall
        self.done = threading.Event()
        if hasattr(faulthandler, "register"):
            faulthandler.register(SHOW_STACKS, all_threads=True)

    def run(self) -> None:
        """Publish this rank's count and compare all ranks' with the last tick's, until `stop`."""
        before: Any = None
        idle_s = 0.0
        while not self.done.wait(self.tick_s):
            try:
                self.heartbeat.publish()
                beats = self.heartbeat.read_all()
                now: Any = [(beat["rank"], beat["step"], beat["phase"], beat["count"]) for beat in beats]
                now.append(self.heartbeat.bytes_saved())
            except MemoryError:
                now = before  # unknown, so not progress: a stall if it lasts
            idle_s = idle_s + self.tick_s if now == before else 0.0
            before = now
            if idle_s >= self.timeout_s:
                self._stall()

    def _stall(self) -> None:
        self.heartbeat.stalled = True
        beats = self.heartbeat.read_all()
        line = stall_line(beats, self.timeout_s)
        warn(line + "\n" + f"stacks of {self.heartbeat.where()}:")
        faulthandler.dump_traceback(all_threads=True)
        self.on_stall(line)
        time.sleep(2 * self.tick_s)  # the other ranks' watchdogs end them
        for beat in beats:
            if beat["rank"] != self.heartbeat.world.rank and beat["host"] == socket.gethostname():
                kill_or_show_stacks(int(beat["pid"]))
        os._exit(EXIT_STALLED)

    def stop(self) -> None:
        """End the thread."""
        self.done.set()


def stall_line(beats: list[dict[str, Any]], timeout_s: float) -> str:
    """Name the stopped rank, or else the one that is furthest behind, and where the others wait.

    >>> beats = [{"rank": 0, "step": 37, "phase": "exchange", "host": "a", "pid": 0, "waits": "sum_rows"}]
    >>> beats += [{"rank": 1, "step": 37, "phase": "reward", "host": "a", "pid": 0, "waits": ""}]
    >>> stall_line(beats, 60.0)
    'STALL rank=1 phase=reward step=37 no progress for 60 s; rank 0 waits in exchange, step 37'
    """
    if not beats:
        return f"STALL no heartbeat can be read, no progress for {timeout_s:.0f} s"

    def behind(beat: dict[str, Any]) -> tuple[bool, int, int, bool]:
        stopped = beat["host"] == socket.gethostname() and state_of(int(beat["pid"])) in ("T", "Z", "gone")
        place = ORDER.index(beat["phase"]) if beat["phase"] in ORDER else len(ORDER)
        return not stopped, int(beat["step"]), place, bool(beat.get("waits"))

    first = min(beats, key=behind)
    stalled = [beat for beat in beats if behind(beat) == behind(first)]
    waiting = [beat for beat in beats if behind(beat) != behind(first)]
    ranks = ",".join(str(beat["rank"]) for beat in stalled)
    line = f"STALL rank={ranks} phase={first['phase']} step={first['step']} no progress for {timeout_s:.0f} s"
    if first.get("saving"):
        line += f" (saving: {first['saving']})"
    return line + "".join(f"; rank {b['rank']} waits in {b['phase']}, step {b['step']}" for b in waiting)
