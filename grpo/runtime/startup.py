"""Checks before the first step: one run per output folder, a folder that all ranks share, equal settings."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.runtime.distributed import World

LOCK_WAIT_S = 60.0
FOLDER_WAIT_S = 30.0


class OutputLock:
    """Allows one run per output folder. The kernel releases the lock when the process that holds it ends."""

    def __init__(self, output_dir: Path, notice: Callable[[str], None], wait_s: float = LOCK_WAIT_S):
        """Wait for an earlier run to end. Raises UserError when it does not end in time."""
        self.file: IO[str] = (output_dir / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        waiting = False
        while not self._try_lock():
            if not waiting:
                self.file.seek(0)
                notice(f"{output_dir} is in use by process {self.file.read().strip() or '?'}: waiting for it to end")
                waiting = True
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir: {output_dir} is in use by another run, still after {wait_s:.0f} s. "
                    "Stop that run, or choose another --output_dir."
                )
            time.sleep(0.2)
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def check_folder_shared(world: World, output_dir: Path, wait_s: float = FOLDER_WAIT_S) -> None:
    """Check that every rank sees a file that rank 0 writes. Raises UserError, on every rank, naming one that does not.

    It retries for a while: a network file system may show a new file late. Listing the folders refreshes its cache.
    """
    if world.size == 1:
        return
    token = int.from_bytes(os.urandom(6), "big") if world.is_main else 0
    if world.is_main:
        (output_dir / f".shared-{token}").touch()
    token = int(world.sum_rows(np.array([token], dtype=np.float64))[0])
    file = output_dir / f".shared-{token}"
    deadline = time.monotonic() + wait_s
    while not (visible := file.exists()) and time.monotonic() < deadline:
        for folder in (output_dir.parent, output_dir):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.5)
    visible_on = world.gather_rows(np.array([visible], dtype=np.float64))[:, 0]
    if world.is_main:
        file.unlink(missing_ok=True)
    missing_on = np.flatnonzero(visible_on == 0).tolist()
    if missing_on:
        raise UserError(
            f"output_dir: rank {missing_on[0]} does not see what rank 0 writes to {output_dir}, still after "
            f"{wait_s:.0f} s. "
            "All nodes need the same folder: choose an --output_dir on a disk that they share."
        )


def check_ranks_agree(world: World, cfg: Config, facts: Mapping[str, object]) -> None:
    """Compare settings and fingerprints over ranks. Raises UserError, on every rank, naming field and rank."""
    values = {**dataclasses.asdict(cfg), **facts}
    row = [int.from_bytes(hashlib.sha256(repr(v).encode()).digest()[:6], "big") for v in values.values()]
    rows = world.gather_rows(np.array(row, dtype=np.float64))
    for column, name in enumerate(values):
        different = [rank for rank in range(world.size) if rows[rank, column] != rows[0, column]]
        if different:
            raise UserError(
                f"ranks disagree about {name}: rank {different[0]} differs from rank 0. Start every process with the "
                "same settings, files and versions."
            )
