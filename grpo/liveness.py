"""Who is alive, and where: heartbeats, the lock on an output folder, death with the parent, ranks that agree.

Each rank keeps one small file, output_dir/.ranks/rank_R.json, with its process, step and phase. When a rank
dies, the others' collectives fail; they look there and say which rank is gone and what it was doing.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from grpo.config import Config
from grpo.console import warn
from grpo.distributed import World
from grpo.errors import UserError

LOCK_WAIT_S = 60.0
FOLDER_WAIT_S = 30.0
PR_SET_PDEATHSIG = 1


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

    def __call__(self, step: int, phase: str) -> None:
        """Note where this rank is. A folder that cannot be written costs the note, not the run."""
        self.step, self.phase = step, phase
        beat = {"pid": os.getpid(), "host": socket.gethostname(), "step": step, "phase": phase}
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"rank_{self.world.rank}.json").write_text(json.dumps(beat), encoding="utf-8")
        except OSError:
            return

    def where(self) -> str:
        """This rank's place, for messages."""
        return f"rank {self.world.rank}, phase {self.phase}, step {self.step}"

    def gone(self, wait_s: float = 2.0) -> list[str]:
        """Ranks of this host whose process has ended, with their last place. Waits a little for the kernel."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [line for rank in range(self.world.size) if (line := self._ended(rank))]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _ended(self, rank: int) -> str | None:
        try:
            beat = json.loads((self.folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            if beat["host"] != socket.gethostname() or _running(int(beat["pid"])):
                return None
            return f"rank {rank} is gone, last in phase {beat['phase']}, step {beat['step']}"
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _running(pid: int) -> bool:
    """Whether a process of this host runs; one that is dead and not collected yet (a zombie) does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def report_on_sigterm(heartbeat: Heartbeat) -> None:
    """When the launcher ends this rank because another one died, say which, even from inside a collective.

    Python's own handlers wait for the main thread, which may hang in a collective for ever; the wake-up pipe
    does not.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reading, 16):
            pass
        for line in heartbeat.gone(wait_s=0.5):
            warn(f"error: {line}")
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class OutputLock:
    """One writer per output folder. The kernel lets go of the lock when its holder dies, however it dies."""

    def __init__(self, output_dir: Path, notice: Callable[[str], None], wait_s: float = LOCK_WAIT_S):
        """Wait for a predecessor that is still ending. Raises UserError when it does not end in time."""
        self.file: IO[str] = (output_dir / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        told = False
        while not self._taken():
            if not told:
                self.file.seek(0)
                notice(f"{output_dir} is in use by process {self.file.read().strip() or '?'}: waiting for it to end")
                told = True
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir: {output_dir} is in use by another run, still after {wait_s:.0f} s. "
                    "Stop that run, or choose another --output_dir."
                )
            time.sleep(0.2)
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def check_folder_shared(world: World, output_dir: Path, wait_s: float = FOLDER_WAIT_S) -> None:
    """Have every rank find a file that rank 0 writes. Raises UserError, on every rank, naming one that does not.

    Looks for a while: a network file system may show a new file late. Listing the folders makes it ask again.
    """
    if world.size == 1:
        return
    token = int.from_bytes(os.urandom(6), "big") if world.is_main else 0
    if world.is_main:
        (output_dir / f".shared-{token}").touch()
    token = int(world.sum_rows(np.array([token], dtype=np.float64))[0])
    file = output_dir / f".shared-{token}"
    deadline = time.monotonic() + wait_s
    while not (found := file.exists()) and time.monotonic() < deadline:
        for folder in (output_dir.parent, output_dir):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.5)
    seen = world.gather_rows(np.array([found], dtype=np.float64))[:, 0]
    if world.is_main:
        file.unlink(missing_ok=True)
    blind = np.flatnonzero(seen == 0).tolist()
    if blind:
        raise UserError(
            f"output_dir: rank {blind[0]} does not see what rank 0 writes to {output_dir}, still after {wait_s:.0f} s. "
            "All nodes need the same folder: choose an --output_dir on a disk that they share."
        )


def check_ranks_agree(world: World, cfg: Config, facts: Mapping[str, object]) -> None:
    """Compare settings and fingerprints over ranks. Raises UserError, on every rank, naming field and rank."""
    values = {**dataclasses.asdict(cfg), **facts}
    row = [int.from_bytes(hashlib.sha256(repr(v).encode()).digest()[:6], "big") for v in values.values()]
    rows = world.gather_rows(np.array(row, dtype=np.float64))
    for column, name in enumerate(values):
        odd = [rank for rank in range(world.size) if rows[rank, column] != rows[0, column]]
        if odd:
            raise UserError(
                f"ranks disagree about {name}: rank {odd[0]} differs from rank 0. Start every process with the same "
                "settings, files and versions."
            )
