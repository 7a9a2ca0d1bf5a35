"""A process that has imported everything and forks ranks from itself, so that starting a run takes a second, not ten.

    python -m tests.support.fork_server        requests on stdin, replies on stdout, one JSON object a line

It plays torchrun: it holds the rendezvous store of a job (in a process of its own), starts the ranks with torchrun's
environment, and when one fails ends the others with SIGTERM, later SIGKILL. It runs no tensor operation and has a
single thread, or forking would not be sound. What its ranks leave behind is handed to it (it is a subreaper), so that
orphans can be counted. tests/support/jobs.py is the other end.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT = 0x20000, 0x4000, 0x40000, 1, 32
LIBC = ctypes.CDLL(None, use_errno=True)
POLL_S = 0.02


@dataclass
class Job:
    """The processes of one launch."""

    folder: Path
    ranks: dict[int, int]  # process -> rank, those that run
    store: int
    kill_after_s: float
    failed_at: float | None = None
    killed: bool = False
    ended: dict[int, int] = field(default_factory=dict)  # rank -> code, -n for signal n


def preload() -> None:
    """Import what a run imports, down to what is imported late."""
    for name in (
        "train",
        "inference",
        "grpo.evaluate.command",
        "grpo.sft.train",
        "tests.support.tiny",
        "torch._dynamo",  # the first optimizer step imports it
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "transformers.models.qwen3.modeling_qwen3",
        "datasets.packaged_modules.json.json",
        "deepspeed",
        "peft",
    ):
        importlib.import_module(name)
    mapping = importlib.import_module("transformers.conversion_mapping")  # patterns, compiled when first asked for
    if hasattr(mapping, "get_checkpoint_conversion_mapping"):
        mapping.get_checkpoint_conversion_mapping("qwen3")
    gc.collect()
    gc.freeze()  # ranks share these pages as long as no collection writes into them


def serve() -> int:
    """Answer requests until stdin ends. In a forked rank: return that rank's exit code."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no reply
    preload()
    threads = len(os.listdir("/proc/self/task"))
    print(json.dumps({"ready": True, "threads": threads}), file=replies, flush=True)
    jobs: list[Job] = []
    while True:
        reap(jobs)
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return 0
        request = json.loads(line)
        if request.pop("op") == "launch":
            rank, reply = launch(request, jobs)
            if rank is not None:
                replies.close()
                return run_rank(rank, request, reply["port"])
        else:
            reply = mount(**request)
        print(json.dumps(reply), file=replies, flush=True)


def launch(request: dict[str, Any], jobs: list[Job]) -> tuple[int | None, dict[str, Any]]:
    """Fork the store and the ranks. Returns (None, reply) in the fork server and (rank, reply) in a rank."""
    request["fork_server"] = os.getpid()
    port, store = start_store(os.getpid())
    ranks: dict[int, int] = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            return rank, {"port": port}
        ranks[pid] = rank
    jobs.append(Job(Path(request["folder"]), dict(ranks), store, request["kill_after_s"]))
    return None, {"pids": list(ranks), "store": store, "port": port}


def start_store(fork_server: int) -> tuple[int, int]:
    """Fork a process with a rendezvous store, as torchrun's agent holds it. Returns its port and its process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_with(fork_server)
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.readline()), pid


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run_rank(rank: int, request: dict[str, Any], port: int) -> int:
    """Become one rank of a job: its environment, its faults, then the run. Returns the exit code."""
    die_with(request["fork_server"])
    os.setsid()
    folder, world = Path(request["folder"]), request["world"]
    for handle, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank_{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    environment = dict(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    environment |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    if request["torchrun"]:
        os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(request["environment"])

    argv = request["argv"] + request["argv_of"].get(str(rank), [])
    return run_program(request["program"], argv, request["cwd"])


def run_program(program: str, argv: list[str], cwd: str) -> int:
    """A file as `python FILE` runs it, or a module as `python -m MODULE` does. Returns the exit code."""
    os.chdir(cwd)
    sys.argv = [program, *argv]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def reap(jobs: list[Job]) -> None:
    """Collect processes that ended, write down their codes, and end jobs of which a rank failed."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        for job in jobs:
            if pid in job.ranks:
                note_end(job, job.ranks.pop(pid), os.waitstatus_to_exitcode(status))
    for job in jobs:
        if job.failed_at is not None and not job.killed and time.monotonic() > job.failed_at + job.kill_after_s:
            job.killed = True
            send(job, signal.SIGKILL)
        if not job.ranks and job.store:
            os.kill(job.store, signal.SIGKILL)
            job.store = 0
    jobs[:] = [job for job in jobs if job.ranks]


def note_end(job: Job, rank: int, code: int) -> None:
    """Write a rank's code where the other end looks; the first failure ends the other ranks."""
    job.ended[rank] = code
    aside = job.folder / f".rank_{rank}.exit"
    aside.write_text(str(code))
    aside.rename(job.folder / f"rank_{rank}.exit")
    if code != 0 and job.failed_at is None:
        job.failed_at = time.monotonic()
        send(job, signal.SIGTERM)


def send(job: Job, number: int) -> None:
    """A signal to all ranks that run; they are our children and not collected, so the numbers are theirs."""
    for pid in job.ranks:
        os.kill(pid, number)


def mount(path: str, size: str, read_only: bool) -> dict[str, Any]:
    """A small file system of its own for the ranks, or the same with other options; gone with this process."""
    if not mount.__dict__.get("own"):  # once: a mount namespace that nobody else sees
        if LIBC.unshare(CLONE_NEWNS) or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            return {"error": os.strerror(ctypes.get_errno())}
        mount.__dict__["own"] = True
    flags = (MS_REMOUNT if os.path.ismount(path) else 0) | (MS_RDONLY if read_only else 0)
    if LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", flags, f"size={size}".encode()):
        return {"error": os.strerror(ctypes.get_errno())}
    return {"seen_at": f"/proc/{os.getpid()}/root{path}"}


if __name__ == "__main__":
    sys.exit(serve())
