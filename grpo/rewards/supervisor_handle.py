"""The trainer's side of one supervisor: its process, the socket to it, the calls it is working on."""

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
GRACE_S = 10.0  # beyond all deadlines, until a supervisor itself counts as lost
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "SYSTEMROOT", "VIRTUAL_ENV")  # and LC_*


class SupervisorHandle:
    """One supervisor. `greeting` must be called before anything is sent."""

    def __init__(self, cfg: Config, functions: list[dict[str, Any]]):
        """Start the process, without waiting for it. functions: see `locate`."""
        self.splitter = Splitter(MAX_ANSWER + 1)
        self.busy: list[int] = []  # the calls it was sent and has not answered; the first one runs
        self.time_left_s = 0.0  # without an answer within this time the supervisor itself counts as lost
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
        """Send all of it. An error is ignored here: the next read from a lost supervisor reports it."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def greeting(self) -> dict[str, Any]:
        """Wait until the functions are imported: their descriptions, and whether it is enclosed. Raises UserError."""
        self.socket.setblocking(True)
        ready = selectors.DefaultSelector()
        with ready:
            ready.register(self.socket, selectors.EVENT_READ)
            greeting = read_frame(self.socket.fileno(), MAX_REQUEST) if ready.select(IMPORT_S + GRACE_S) else None
        self.socket.settimeout(GRACE_S)
        if greeting is None:
            error = UserError(
                "rewards: a reward worker could not be started; its output, if any, is above. "
                "--reward_workers 0 calls reward functions in the trainer's own process."
            )
            error.on_one_rank = True
            raise error
        return load(greeting)

    def close(self) -> None:
        """Close the socket, on which the supervisor ends with all its descendants; kill it if it does not."""
        self.socket.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # the supervisor removed it, unless it was killed


def _environment(folder: Path) -> dict[str, str]:
    """The environment of workers: no access tokens, no GPU, one thread, `folder` as home."""
    passed = {key: value for key, value in os.environ.items() if key in KEPT_ENVIRONMENT or key.startswith("LC_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **passed,
        **threads,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **{key: os.environ[key] for key in (WITHOUT_NAMESPACES,) if key in os.environ},
    }
