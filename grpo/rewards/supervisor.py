"""Between the trainer and the reward functions: enforces deadlines and limits, kills and replaces workers.

Two processes. The keeper, the trainer's child, makes the namespaces and forks the supervisor into them; then it waits
for the supervisor to end or the trainer to die, and cleans up. The supervisor is process 1 of its namespace and runs no
user code. It forks workers when it needs them, at most two: one for plain functions, and one that forks a process for
each call of a function marked `runs_code`. When a call is late, dies or exceeds a limit, one signal kills everything
below the supervisor, and the calls after it go to a new worker.

    python -m grpo.rewards.supervisor PID       PID: the trainer; a socket to it is fd 0
"""

import contextlib
import os
import select
import signal
import sys
import time
from typing import Any

from grpo.rewards import sandbox, worker
from grpo.rewards.protocol import MAX_ANSWER, MAX_REQUEST, Splitter, dump, frame, load, read_frame, write_all

TRAINER = 0  # the socket
TICK_S = 0.05  # how often a running call's processes and memory are counted
PARENT_DIED = signal.SIGUSR1
LATER_S = 2.0  # beyond their time limit, which the worker itself keeps for coroutines
ANSWER, LOST, LATE = b"A", b"L", b"T"  # first byte of what goes to the trainer


class Lost(Exception):
    """The worker gave no answer and must be killed."""

    kind = LOST


class Late(Lost):
    """The worker gave no answer in time."""

    kind = LATE


class Gone(Exception):
    """The trainer has closed its end."""


class Worker:
    """One forked worker and the pipes to it."""

    def __init__(self, hello: dict[str, Any], enclosed: bool, fork_each: bool, folder: str):
        """Fork it and wait until it has imported its functions. Raises Lost."""
        theirs, self.to_worker = os.pipe()
        self.from_worker, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):  # an error must not leave here and run a second supervisor
                os.close(self.to_worker)
                os.close(self.from_worker)
                _become_worker(enclosed, fork_each, folder)
                worker.serve(hello, theirs, answers, fork_each)
            os._exit(1)
        os.close(theirs)
        os.close(answers)
        os.set_blocking(self.to_worker, False)
        self.unsent = memoryview(b"")
        self.max_bytes = hello["memory_mb"] << 20
        self.memory_mb = hello["memory_mb"]
        self.splitter = Splitter(MAX_REQUEST)  # the first answer is long: it holds the functions' text
        try:
            self.descriptions = load(self.answer(hello["import_s"]))
        except Lost:
            self.close()
            raise
        self.splitter.cap = MAX_ANSWER
        self.own = set(sandbox.descendants())  # processes that the import started may stay
        self.max_bytes += sandbox.resident(list(self.own))

    def send(self, *frames: bytes) -> None:
        """Queue frames, which `answer` writes while it waits: a busy worker does not read, and must not block us."""
        self.unsent = memoryview(b"".join(map(frame, frames)))

    def answer(self, within_s: float) -> bytes:
        """Wait for the next frame from the worker. Raises Lost, Late and Gone."""
        looked = time.monotonic()
        deadline = looked + within_s
        while True:
            try:
                if (found := self.splitter.next()) is not None:
                    return found
            except ValueError as error:
                raise Lost(f"its answer is too long: {error}") from None
            now = time.monotonic()
            if now >= deadline:
                raise Late(f"no answer within {within_s:g} s")
            if now - looked >= TICK_S:
                looked = now
                self.check()
            outgoing = [self.to_worker] if self.unsent else []
            ready, writable, _ = select.select([TRAINER, self.from_worker], outgoing, [], min(TICK_S, deadline - now))
            if TRAINER in ready:  # the trainer sends nothing while it waits for answers: this is the end of the stream
                raise Gone
            if writable:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    self.unsent = self.unsent[os.write(self.to_worker, self.unsent[: 1 << 16]) :]
            if self.from_worker in ready:
                data = os.read(self.from_worker, 1 << 16)
                if not data:
                    raise Lost(self._end())
                self.splitter.feed(data)

    def check(self) -> None:
        """Reap ended processes. Raises Lost when the worker has ended, or exceeds its processes or memory."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self.pid:
                raise Lost(f"{worker.how_it_ended(status)} before it answered")
            if pid == 0:
                break
        running = sandbox.descendants()
        if len(running) > sandbox.MAX_PROCESSES:
            raise Lost(f"more than {sandbox.MAX_PROCESSES} processes at once")
        if sandbox.resident(running) > self.max_bytes:
            raise Lost(f"more than {self.memory_mb} MB of memory")

    def _end(self) -> str:
        """Why a worker closed its pipe: how it ended; or that it has not ended."""
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return f"{worker.how_it_ended(status)} before it answered"
            time.sleep(0.01)
        return "it closed the pipe to its supervisor"

    def close(self) -> None:
        """Close the pipes; the worker itself was killed before."""
        os.close(self.to_worker)
        os.close(self.from_worker)


def _become_worker(enclosed: bool, fork_each: bool, folder: str) -> None:
    sandbox.die_with(1 if enclosed else os.getppid(), signal.SIGKILL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # the trainer's socket; standard output and error
        os.dup2(null, fd)
    sandbox.limit(enclosed)
    if not fork_each:  # else the process of each call does, once it is in its namespace
        sandbox.drop_privileges()
    worker.stay_in_session()
    os.mkdir(folder)
    worker.enter(folder)


class Supervisor:
    """Makes the calls that the trainer requests, and survives its workers."""

    def __init__(self, hello: dict[str, Any], enclosed: bool):
        self.hello, self.enclosed = hello, enclosed
        self.workers: dict[bool, Worker] = {}
        self.num_started = 0
        self.out: list[bytes] = []

    def serve(self) -> None:
        """Send the functions' descriptions, then answer requests until the trainer is gone; kill all workers then."""
        with contextlib.suppress(Gone, BrokenPipeError, ConnectionResetError):
            try:
                descriptions = self.worker(False).descriptions
            except Lost as lost:
                descriptions = [{"error": f"importing the reward functions failed: {lost}."}]
            self.queue(dump({"enclosed": self.enclosed, "functions": descriptions}))
            self.flush()
            while (header := read_frame(TRAINER, MAX_REQUEST)) is not None:
                body = read_frame(TRAINER, MAX_REQUEST)
                if body is None:
                    break
                self.answer_all(load(header), body)
                self.flush()
        self.clear()

    def answer_all(self, request: dict[str, Any], body: bytes) -> None:
        """Make every call of a request, and answer them in its order."""
        calls, fork_each, together = request["calls"], request["runs_code"], request["together"]
        while calls:
            # one call at a time where code runs: processes that it left are killed before the next call
            batch = calls[:1] if fork_each else calls
            try:
                current = self.worker(fork_each)
                current.send(dump({**request, "calls": batch, "together": together}), body)
                for _, rows in batch:
                    limit_s = self.hello["timeout_s"] * len(rows) + (LATER_S if together else 0.0)
                    self.queue(ANSWER + current.answer(limit_s))
                    calls = calls[1:]
                    if not current.splitter.buffer:
                        self.flush()
            except Lost as lost:
                self.clear()
                if together and len(calls) > 1:  # any of them may be the cause: each alone will show which one
                    together = False
                    continue
                self.queue(lost.kind + str(lost).encode())
                calls = calls[1:]
            else:
                if current.unsent or current.splitter.buffer or self.has_leftovers():
                    self.clear()  # the worker wrote more than answers, or left processes behind

    def worker(self, fork_each: bool) -> Worker:
        """The worker for plain calls or for calls that run code, started if needed. Raises Lost."""
        if fork_each in self.workers and os.waitpid(self.workers[fork_each].pid, os.WNOHANG)[0]:
            self.clear()  # it ended while it was idle, so no call fails
        if fork_each not in self.workers:
            self.num_started += 1
            folder = os.path.join(self.hello["folder"], str(self.num_started))
            self.workers[fork_each] = Worker(self.hello, self.enclosed, fork_each, folder)
        return self.workers[fork_each]

    def has_leftovers(self) -> bool:
        """Whether there are processes that a call started."""
        return not set(sandbox.descendants()) <= set().union(*(w.own for w in self.workers.values()))

    def clear(self) -> None:
        """Kill all workers and their descendants."""
        sandbox.kill_all(self.enclosed, [w.pid for w in self.workers.values()])
        for one in self.workers.values():
            one.close()
        self.workers = {}

    def queue(self, data: bytes) -> None:
        """Queue a frame for the trainer."""
        self.out.append(frame(data))

    def flush(self) -> None:
        """Send the queued frames."""
        write_all(TRAINER, b"".join(self.out))
        self.out = []


def main() -> None:
    """The keeper: start the supervisor, wait, clean up."""
    trainer = int(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the trainer decides when its rewards end
        signal.signal(number, signal.SIG_IGN)
    awaited = {signal.SIGCHLD, PARENT_DIED}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    start = read_frame(TRAINER, MAX_REQUEST)
    if start is None:
        return
    hello = load(start)
    enclosed = sandbox.enclose()
    sandbox.die_with(trainer, PARENT_DIED)
    sandbox.adopt_orphans()
    sandbox.hide()
    keeper = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        sandbox.die_with(keeper, signal.SIGKILL)
        sandbox.adopt_orphans()
        try:
            Supervisor(hello, enclosed).serve()
        finally:
            sys.stderr.flush()
    else:
        os.close(TRAINER)
        while os.getppid() == trainer and os.waitpid(supervisor, os.WNOHANG)[0] == 0:
            signal.sigwait(awaited)
        sandbox.kill_all(False, [])
        import shutil  # slow to import, needed once

        shutil.rmtree(hello["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
