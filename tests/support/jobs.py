"""The other end of tests/support/fork_server.py: start jobs, send signals, wait for them, read their output."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def environment() -> dict[str, str]:
    """This environment without another launcher's ranks in it."""
    ours = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}}
    return {**ours, **QUIET, "PYTHONPATH": str(PROJECT)}


class Job:
    """One launch of W ranks."""

    def __init__(self, folder: Path, pids: Sequence[int], store: int):
        self.folder, self.pids, self.store = folder, list(pids), store
        self.began = time.monotonic()

    def code(self, rank: int) -> int | None:
        """A rank's exit code, -n for signal n; None while it runs."""
        file = self.folder / f"rank_{rank}.exit"
        return int(file.read_text()) if file.exists() else None

    def ended(self, rank: int) -> bool:
        """Whether a rank did."""
        return self.code(rank) is not None

    def codes(self) -> list[int | None]:
        """Of all ranks."""
        return [self.code(rank) for rank in range(len(self.pids))]

    def running(self) -> bool:
        """Whether any rank does."""
        return None in self.codes()

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """A signal to one rank, or to all, as far as they run."""
        for job_rank, pid in enumerate(self.pids):
            if rank in (None, job_rank) and self.code(job_rank) is None:
                os.kill(pid, number)  # the fork server has not collected it yet, so the id is still its own

    def wait(self, timeout: float = 60.0) -> list[int]:
        """Exit codes by rank. Fails, and kills the job, when it takes longer than `timeout` seconds."""
        try:
            wait_for(lambda: not self.running(), timeout)
        except AssertionError:
            message = f"still running after {timeout} s: {self.codes()}\n{self.text()[-3000:]}"
            self.kill()
            raise AssertionError(message) from None
        return [code for code in self.codes() if code is not None]

    def text(self, rank: int | None = None, *streams: str) -> str:
        """What the ranks printed, stdout ("out") before stderr ("err")."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        names = streams or ("out", "err")
        files = [self.folder / f"rank_{job_rank}.{stream}" for job_rank in ranks for stream in names]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())


class ForkServer:
    """A running fork server."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "fork_server.log"
        self.launches = 0
        self.jobs: list[Job] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=PROJECT,
            text=True,
            stderr=self.log.open("w"),
            env=environment() | SINGLE_THREADED | {"HF_DATASETS_CACHE": str(folder / "datasets")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        ready = self._reply()
        assert ready["threads"] == 1, f"{ready['threads']} threads: forking them is not sound"

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def launch(
        self,
        program: str,
        argv: Sequence[str],
        world: int = 2,
        argv_of: Mapping[int, Sequence[str]] | None = None,
        env: Mapping[str, str] | None = None,
        torchrun: bool = True,
        kill_after_s: float = 30.0,
        cwd: Path = PROJECT,
    ) -> Job:
        """Start a program, a file's path or a module's name, with these arguments on `world` ranks.

        argv_of: arguments of single ranks beside those. torchrun False: one plain process, without a launcher's
        environment. kill_after_s: from the SIGTERM that follows a failed rank to SIGKILL.
        """
        self.launches += 1
        folder = self.folder / f"launch_{self.launches}"
        folder.mkdir()
        reply = self._ask(
            op="launch",
            folder=str(folder),
            world=world,
            program=program,
            argv=list(argv),
            cwd=str(cwd),
            torchrun=torchrun,
            argv_of={str(rank): list(extra) for rank, extra in (argv_of or {}).items()},
            environment=dict(env or {}),
            kill_after_s=kill_after_s,
        )
        job = Job(folder, reply["pids"], reply["store"])
        self.jobs.append(job)
        return job

    def mount(self, path: Path, size: str, read_only: bool = False) -> Path:
        """Give the ranks a file system of that size at `path`, or change it. Returns where it is seen from here."""
        reply = self._ask(op="mount", path=str(path), size=size, read_only=read_only)
        if "error" in reply:
            raise PermissionError(f"no file system could be mounted: {reply['error']}")
        return Path(reply["seen_at"])

    def orphans(self, patience_s: float = 5.0) -> list[int]:
        """Descendants that belong to no running job, after they had some seconds to end."""
        deadline = time.monotonic() + patience_s
        while True:
            expected = {pid for job in self.jobs if job.running() for pid in (*job.pids, job.store)}
            left = [pid for pid in descendants(self.process.pid, expected) if pid not in expected]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.05)

    def close(self) -> None:
        """End it, and everything that it started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@functools.cache
def fork_server() -> ForkServer:
    """The one of this session, started when it is first needed."""
    folder = tempfile.TemporaryDirectory(prefix="fork_server_")
    made = ForkServer(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(made.close)  # before the folder goes
    return made


def descendants(root: int, leave_out: set[int]) -> list[int]:
    """Processes below `root`, but for those below `leave_out`; none that only waits to be collected."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(name))
    found, unseen = [], [root]
    while unseen:
        for pid in children.get(unseen.pop(), []):
            found.append(pid)
            if pid not in leave_out:
                unseen.append(pid)
    return found


def wait_for(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Until it holds. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
