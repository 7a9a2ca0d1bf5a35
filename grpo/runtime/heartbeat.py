"""Who is alive, and where: heartbeats, and a watchdog that names the rank that hangs.

Each rank keeps one small file, output_dir/.ranks/rank_R.json, with its process, step, phase and a count that grows
with every piece of work. When a rank dies, the others' collectives fail; they look there and say which rank is gone
and what it was doing. When no rank's count moves for `stall_timeout_s`, every rank that still runs prints its stacks,
names the rank that is furthest behind, and ends with code 74.
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
SHOW_STACKS = signal.SIGUSR1  # works even where a rank hangs outside Python


def die_with_parent() -> None:
    """On Linux, have this process killed when its launcher dies, so that no worker writes on as an orphan."""
    if sys.platform == "linux" and "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Heartbeat:
    """This rank's line in the folder of heartbeats."""

    def __init__(self, output_dir: Path, world: World):
        self.world = world
        self.folder = output_dir / ".ranks"
        self.step, self.phase = 0, "start"
        self.saved = ""  # how far the save in the background is
        self.stalled = False  # the watchdog is about to end this process
        self.count = 0
        self.lock = threading.Lock()
        self.published: dict[str, Any] = {}
        if not world.is_main:
            return
        for left in self.folder.glob("rank_*.json"):  # an earlier run's: its ranks are not ours
            left.unlink(missing_ok=True)

    def __call__(self, step: int, phase: str) -> None:
        """Note where this rank is."""
        self.step, self.phase = step, phase
        self.beat()
        self.publish()

    def beat(self) -> None:
        """Note a piece of work done: a token, a micro-batch, a score."""
        self.count += 1

    def saving(self, step: int, phase: str) -> None:
        """Note how far a save is, from the thread that saves."""
        self.saved = f"{phase} of checkpoint_{step}"
        self.beat()

    def publish(self) -> None:
        """Write the file. A folder that cannot be written costs the note, not the run."""
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
                os.replace(file.with_suffix(".new"), file)  # so that nobody reads half of it
                self.published = beat
        except OSError:
            return

    def leave(self) -> None:
        """This rank ends in good order: the others need not miss it."""
        self.phase = ENDED
        self.publish()

    def where(self) -> str:
        """This rank's place, for messages."""
        return f"rank {self.world.rank}, phase {self.phase}, step {self.step}"

    def read(self, rank: int) -> dict[str, Any] | None:
        """What a rank published last; None when that cannot be read (now)."""
        try:
            beat = json.loads((self.folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            return {"rank": rank, **beat} if {"pid", "host", "step", "phase", "count"} <= set(beat) else None
        except (OSError, ValueError, TypeError):
            return None

    def everyone(self) -> list[dict[str, Any]]:
        """What all ranks published last, as far as it can be read."""
        return [beat for rank in range(self.world.size) if (beat := self.read(rank)) is not None]

    def being_saved(self) -> int:
        """Bytes of the checkpoint that is being written: a large one on a slow disk is progress too."""
        total = 0
        with contextlib.suppress(OSError):  # renamed this very moment
            for path in self.folder.parent.glob(".tmp-checkpoint_*/**/*"):
                total += path.stat().st_size
        return total

    def gone(self, wait_s: float = 2.0) -> list[str]:
        """Ranks of this host whose process has ended, with their last place. Waits a little for the kernel."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [
                f"rank {beat['rank']} is gone, last in phase {beat['phase']}, step {beat['step']}"
                for beat in self.everyone()
                if beat["host"] == socket.gethostname()
                and beat["phase"] != ENDED
                and state_of(int(beat["pid"])) in ("gone", "Z")
            ]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)


def state_of(pid: int) -> str:
    """A process of this host: "gone", or the kernel's letter for its state (Z: dead and not collected, T: stopped)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "gone"
    except OSError:
        return "?"


def rouse(pid: int) -> None:
    """A process of this host that did not end with the others: stopped, or hanging outside Python."""
    state = state_of(pid)
    if state == "T":
        os.kill(pid, signal.SIGKILL)  # hears nothing else, and would hold the launcher up
    elif state not in ("gone", "Z", "?"):
        os.kill(pid, SHOW_STACKS)


class Watchdog(threading.Thread):
    """Watches the counts of all ranks; when none moves for `timeout_s`, says who hangs and ends this process.

    Time is counted in ticks of its own, not by the clock, so that a machine that slept is not taken for a stall.
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
        """Publish this rank's count, look at everyone's."""
        seen: Any = None
        still_s = 0.0
        while not self.done.wait(self.tick_s):
            try:
                self.heartbeat.publish()
                beats = self.heartbeat.everyone()
                now: Any = [(beat["rank"], beat["step"], beat["phase"], beat["count"]) for beat in beats]
                now.append(self.heartbeat.being_saved())
            except MemoryError:
                now = seen  # nothing can be told, and nothing gets on: a stall when it lasts
            still_s = still_s + self.tick_s if now == seen else 0.0
            seen = now
            if still_s >= self.timeout_s:
                self._stall()

    def _stall(self) -> None:
        self.heartbeat.stalled = True
        beats = self.heartbeat.everyone()
        line = stall_line(beats, self.timeout_s)
        warn(line + "\n" + f"stacks of {self.heartbeat.where()}:")
        faulthandler.dump_traceback(all_threads=True)
        self.on_stall(line)
        time.sleep(2 * self.tick_s)  # the other ranks come to the same end by themselves
        for beat in beats:
            if beat["rank"] != self.heartbeat.world.rank and beat["host"] == socket.gethostname():
                rouse(int(beat["pid"]))
        os._exit(EXIT_STALLED)

    def stop(self) -> None:
        """No more watching: the run ends."""
        self.done.set()


def stall_line(beats: list[dict[str, Any]], timeout_s: float) -> str:
    """Name the rank that is stopped, else the one furthest behind, and where the others wait.

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
