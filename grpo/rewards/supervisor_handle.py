"""A supervisor as the trainer holds it: its process, the socket to it, the calls it is busy with."""

import contextlib
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from grpo.config.settings import PROJECT, Config
from grpo.errors import UserError
from grpo.rewards.protocol import MAX_ANSWER, MAX_REQUEST, Splitter, dump, frame, load, read_frame
from grpo.rewards.sandbox import WITHOUT_NAMESPACES

IMPORT_S = 60.0  # for importing the functions' files
GRACE_S = 10.0  # beyond all deadlines, before a supervisor itself counts as lost
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "SYSTEMROOT", "VIRTUAL_ENV")  # and LC_*


class SupervisorHandle:
    """One supervisor. `greeting` must be asked for before anything is sent."""

    def __init__(self, cfg: Config, functions: list[dict[str, Any]]):
        """Start the process; does not wait for it."""
        self.splitter = Splitter(MAX_ANSWER + 1)
        self.busy: list[int] = []  # calls, the one that runs first
        self.patience_s = 0.0  # without an answer for that much longer, the supervisor itself is gone
        self.socket, theirs = socket.socketpair()
        self.folder = Path(tempfile.mkdtemp(prefix="reward-"))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo.rewards.supervisor", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=PROJECT,
                env=_environment(self.folder),
                start_new_session=True,
            )
        finally:
            theirs.close()
        hello = {
            "functions": functions,
            "path": sys.path,
            "folder": str(self.folder),
            "import_s": IMPORT_S,
            "timeout_s": cfg.reward_timeout_s,
            "memory_mb": cfg.reward_memory_mb,
        }
        self.socket.settimeout(IMPORT_S + GRACE_S)
        self.send(frame(dump(hello)))

    def send(self, data: bytes) -> None:
        """Send all of it. Where the supervisor is gone, reading from it will tell."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def greeting(self) -> dict[str, Any]:
        """Wait for what it says once the functions are imported. Raises UserError when it says nothing."""
        self.socket.setblocking(True)
        ready = selectors.DefaultSelector()
        with ready:
            ready.register(self.socket, selectors.EVENT_READ)
            said = read_frame(self.socket.fileno(), MAX_REQUEST) if ready.select(IMPORT_S + GRACE_S) else None
        self.socket.settimeout(GRACE_S)
        if said is None:
            error = UserError(
                "rewards: a reward worker could not be started; its last words, if any, are above. "
                "--reward_workers 0 calls reward functions in the trainer's own process."
            )
            error.on_one_rank = True
            raise error
        return load(said)

    def close(self) -> None:
        """Let it end by itself, which takes everything below along; kill it when it does not."""
        self.socket.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already, unless it was killed


def _environment(folder: Path) -> dict[str, str]:
    """What workers get of the environment: no tokens, no GPU, one thread, a home of their own."""
    kept = {key: value for key, value in os.environ.items() if key in KEPT_ENVIRONMENT or key.startswith("LC_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **kept,
        **threads,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **{key: os.environ[key] for key in (WITHOUT_NAMESPACES,) if key in os.environ},
    }
