"""Between the trainer and the code of a reward: holds deadlines and limits, kills and replaces its workers.

Two processes. The keeper, the trainer's child, makes the namespaces and forks the supervisor into them; then it only waits,
for the supervisor to end or the trainer to die, and clears up. The supervisor is process 1 of its namespace, and runs
nothing of the user's. It forks a worker where it needs one, at most two: one for plain functions, one from which each
call of a function that runs code gets a process of its own. When a call is late, dies or takes too much, one
signal ends everything below the supervisor, and the calls after it go to a new worker.

    python -m grpo.rewards.supervisor PID       PID: the trainer; a socket to it is fd 0
"""

import contextlib
import os
import select
import signal
import sys
import time
from typing import Any

from grpo.rewards import sandbox as confine
from grpo.rewards import worker
from grpo.rewards.protocol import MAX_ANSWER, MAX_REQUEST, Splitter, dump, frame, load, read_frame, write_all

TRAINER = 0  # the socket
TICK_S = 0.05  # how often a running call's processes and memory are counted
PARENT_DIED = signal.SIGUSR1
ANSWER, LOST, LATE = b"A", b"L", b"T"  # first byte of what goes to the trainer


class Lost(Exception):
    """The worker gave no answer, and is to be killed."""

    kind = LOST


class Late(Lost):
    """It gave none in time."""

    kind = LATE


class Gone(Exception):
    """The trainer has closed its end."""


class Worker:
    """One forked worker and the pipes to it."""

    def __init__(self, hello: dict[str, Any], enclosed: bool, fork_each: bool, folder: str):
        """Fork it, and have it import its functions. Raises Lost."""
        theirs, self.to = os.pipe()
        self.come, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):  # whatever happens here must not run on as a second supervisor
                os.close(self.to)
                os.close(self.come)
                _become_worker(enclosed, fork_each, folder)
                worker.serve(hello, theirs, answers, fork_each)
            os._exit(1)
        os.close(theirs)
        os.close(answers)
        os.set_blocking(self.to, False)
        self.unsent = memoryview(b"")
        self.max_bytes = hello["memory_mb"] << 20
        self.memory_mb = hello["memory_mb"]
        self.splitter = Splitter(MAX_REQUEST)  # its first answer holds the functions' text
        try:
            self.said = load(self.answer(hello["import_s"]))
        except Lost:
            self.close()
            raise
        self.splitter.cap = MAX_ANSWER
        self.own = set(confine.descendants())  # what it started while importing may stay
        self.max_bytes += confine.resident(list(self.own))

    def send(self, *frames: bytes) -> None:
        """Have frames written while `answer` waits: a worker that is busy does not read, and must not block us."""
        self.unsent = memoryview(b"".join(map(frame, frames)))

    def answer(self, within_s: float) -> bytes:
        """The next frame from the worker. Raises Lost, Late and Gone."""
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
                self.look()
            waiting_to_write = [self.to] if self.unsent else []
            ready, writable, _ = select.select([TRAINER, self.come], waiting_to_write, [], min(TICK_S, deadline - now))
            if TRAINER in ready:  # it sends nothing while it waits for answers: this is the end of the stream
                raise Gone
            if writable:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    self.unsent = self.unsent[os.write(self.to, self.unsent[: 1 << 16]) :]
            if self.come in ready:
                data = os.read(self.come, 1 << 16)
                if not data:
                    raise Lost(self._end())
                self.splitter.feed(data)

    def look(self) -> None:
        """Reap what has ended, count what runs. Raises Lost when the worker has ended, or is too many or too much."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self.pid:
                raise Lost(f"{worker.how_it_ended(status)} before it answered")
            if pid == 0:
                break
        running = confine.descendants()
        if len(running) > confine.MAX_PROCESSES:
            raise Lost(f"more than {confine.MAX_PROCESSES} processes at once")
        if confine.resident(running) > self.max_bytes:
            raise Lost(f"more than {self.memory_mb} MB of memory")

    def _end(self) -> str:
        """How a worker ended that closed its pipe; or that it did only that."""
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return f"{worker.how_it_ended(status)} before it answered"
            time.sleep(0.01)
        return "it closed the pipe to its supervisor"

    def close(self) -> None:
        """Close the pipes of one that was killed."""
        os.close(self.to)
        os.close(self.come)


def _become_worker(enclosed: bool, fork_each: bool, folder: str) -> None:
    confine.die_with(1 if enclosed else os.getppid(), signal.SIGKILL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # the trainer's socket, and the places that a print would reach
        os.dup2(null, fd)
    confine.limit(enclosed)
    if not fork_each:  # else each call's process does, after it got its namespace
        confine.drop_privileges()
    worker.stay_in_session()
    os.mkdir(folder)
    worker.enter(folder)


class Supervisor:
    """Makes the calls that the trainer asks for, whatever becomes of the workers."""

    def __init__(self, hello: dict[str, Any], enclosed: bool):
        self.hello, self.enclosed = hello, enclosed
        self.workers: dict[bool, Worker] = {}
        self.num_started = 0
        self.out: list[bytes] = []

    def serve(self) -> None:
        """Say what the functions are, then answer until the trainer is gone. Leaves no process behind."""
        with contextlib.suppress(Gone, BrokenPipeError, ConnectionResetError):
            try:
                said = self.worker(False).said
            except Lost as lost:
                said = [{"error": f"importing the reward functions failed: {lost}."}]
            self.tell(dump({"enclosed": self.enclosed, "functions": said}))
            self.flush()
            while (header := read_frame(TRAINER, MAX_REQUEST)) is not None:
                body = read_frame(TRAINER, MAX_REQUEST)
                if body is None:
                    break
                self.answer_all(load(header), body)
                self.flush()
        self.clear()

    def answer_all(self, request: dict[str, Any], body: bytes) -> None:
        """Make every call of a request; the answers are told in its order."""
        calls, fork_each = request["calls"], request["runs_code"]
        while calls:
            now = calls[:1] if fork_each else calls  # leftovers of a call that ran code are killed before the next
            try:
                current = self.worker(fork_each)
                current.send(dump({**request, "calls": now}), body)
                for _, rows in now:
                    self.tell(ANSWER + current.answer(self.hello["timeout_s"] * len(rows)))
                    calls = calls[1:]
                    if not current.splitter.buffer:
                        self.flush()
            except Lost as lost:
                self.tell(lost.kind + str(lost).encode())
                calls = calls[1:]
                self.clear()
            else:
                if current.unsent or current.splitter.buffer or self.strangers():
                    self.clear()  # it wrote more than answers, or left processes behind

    def worker(self, fork_each: bool) -> Worker:
        """The worker for these calls, a new one where there is none. Raises Lost."""
        if fork_each in self.workers and os.waitpid(self.workers[fork_each].pid, os.WNOHANG)[0]:
            self.clear()  # it ended while it had nothing to do: no call is to blame
        if fork_each not in self.workers:
            self.num_started += 1
            folder = os.path.join(self.hello["folder"], str(self.num_started))
            self.workers[fork_each] = Worker(self.hello, self.enclosed, fork_each, folder)
        return self.workers[fork_each]

    def strangers(self) -> bool:
        """Whether processes run that no import started."""
        return not set(confine.descendants()) <= set().union(*(w.own for w in self.workers.values()))

    def clear(self) -> None:
        """Kill everything below."""
        confine.kill_all(self.enclosed, [w.pid for w in self.workers.values()])
        for one in self.workers.values():
            one.close()
        self.workers = {}

    def tell(self, data: bytes) -> None:
        """Queue a frame for the trainer."""
        self.out.append(frame(data))

    def flush(self) -> None:
        """Send what is queued."""
        write_all(TRAINER, b"".join(self.out))
        self.out = []


def main() -> None:
    """The keeper: start the supervisor, wait, clear up."""
    trainer = int(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the trainer decides when its rewards end
        signal.signal(number, signal.SIG_IGN)
    awaited = {signal.SIGCHLD, PARENT_DIED}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    start = read_frame(TRAINER, MAX_REQUEST)
    if start is None:
        return
    hello = load(start)
    enclosed = confine.enclose()
    confine.die_with(trainer, PARENT_DIED)
    confine.adopt_orphans()
    confine.hide()
    keeper = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        confine.die_with(keeper, signal.SIGKILL)
        confine.adopt_orphans()
        try:
            Supervisor(hello, enclosed).serve()
        finally:
            sys.stderr.flush()
    else:
        os.close(TRAINER)
        while os.getppid() == trainer and os.waitpid(supervisor, os.WNOHANG)[0] == 0:
            signal.sigwait(awaited)
        confine.kill_all(False, [])
        import shutil  # slow to import, needed once

        shutil.rmtree(hello["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
