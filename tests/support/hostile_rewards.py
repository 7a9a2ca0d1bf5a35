"""Reward functions that misbehave on the completion "attack", and score the length of any other one.

tests/rewards/test_isolation.py runs them in reward workers. Never call one in a process that you want to keep.
"""

import builtins
import contextlib
import ctypes
import functools
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CHILDREN = 300
SECONDS = "98765.4321"  # a sleep that is easy to recognise


def hostile(function=None, *, runs_code=False):
    """The function runs on "attack"; what it returns is returned."""
    if function is None:
        return functools.partial(hostile, runs_code=runs_code)

    @functools.wraps(function)
    def reward(completions, **columns):
        if completions[0] == "attack":
            return function(**columns)
        return [float(len(text)) for text in completions]

    reward.runs_code = runs_code
    return reward


@hostile
def loop(**columns):
    while True:
        pass


@hostile
def regex(**columns):
    re.match(r"(a+)+$", "a" * 40 + "b")


@hostile
def deaf(**columns):
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(1)
    while True:
        time.sleep(1)


@hostile
def c_loop(**columns):
    return [sum(itertools.repeat(0))]


@hostile
def power(**columns):
    return [float(len(str(7 ** (7 ** (7**3)))))]


@hostile
def exits_hard(**columns):
    os._exit(0)


@hostile
def system_exit(**columns):
    sys.exit(0)


@hostile
def interrupt(**columns):
    raise KeyboardInterrupt


class Outside(BaseException):
    """Like the time-out exceptions of some libraries."""


@hostile
def base_exception(**columns):
    raise Outside("not an Exception")


@hostile
def recursion(**columns):
    return recursion.__wrapped__(**columns)


@hostile
def stack_overflow(**columns):
    sys.setrecursionlimit(10**9)
    deep = []
    for _ in range(10**6):
        deep = [deep]
    return [repr(deep)]


@hostile
def segfault(**columns):
    ctypes.string_at(0)


@hostile
def bomb(**columns):
    """Children that outlive the call; every second one leaves the session too."""
    for i in range(CHILDREN):
        if os.fork() == 0:
            if i % 2:
                os.setsid()
                if os.fork():
                    os._exit(0)
            time.sleep(float(SECONDS))
            os._exit(0)
    return [1.0]


@hostile
def daemon(**columns):
    subprocess.Popen(["sleep", SECONDS], start_new_session=True)
    return [1.0]


@hostile
def stubborn(**columns):
    """Children with their own sessions, which ignore SIGTERM like their parent."""
    for _ in range(4):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(float(SECONDS))
            os._exit(0)
    time.sleep(float(SECONDS))


@hostile
def ten_gigabytes(**columns):
    return [float(len(bytearray(10 << 30)))]


@hostile
def many_megabytes(**columns):
    """Below the limit of each process, above it together."""
    for _ in range(4):
        if os.fork() == 0:
            held = bytearray(b"x") * (120 << 20)
            time.sleep(float(SECONDS))
            os._exit(len(held) > 0)
    time.sleep(float(SECONDS))


@hostile
def prints(**columns):
    for _ in range(100):
        print("x" * (1 << 20))
    print("x" * (1 << 20), file=sys.stderr)
    os.write(1, b"\0\0\0\x06[99.0]")
    return [1.0]


@hostile
def writes(**columns):
    """Up to the limit of a file's size, beyond the working folder too."""
    with open("../left-behind", "wb") as file:
        for _ in range(512):
            file.write(bytes(1 << 20))
    return [1.0]


@hostile
def long_text(**columns):
    return "x" * (100 << 20)


@hostile
def long_list(**columns):
    return [1.0] * 10**6


@hostile
def closes(**columns):
    os.closerange(0, 256)
    return [1.0]


@hostile
def stops_itself(**columns):
    os.kill(os.getpid(), signal.SIGSTOP)
    return [1.0]


class Odd:
    """An object whose conversions raise."""

    def __float__(self):
        raise RuntimeError("no number")

    def __repr__(self):
        raise RuntimeError("no text")


@hostile
def odd_object(**columns):
    return [Odd()]


def kills_parent(completions, **columns):
    if completions[0] == "attack":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(float(SECONDS))
    return [float(len(text)) for text in completions]


def connects(completions, port, **columns):
    """1.0 when a connection is established."""
    with socket.socket() as ours:
        ours.settimeout(2)
        ours.connect(("127.0.0.1", port[0]))
    return [1.0]


def environment(completions, **columns):
    """The number of the trainer's private variables that are visible, plus files in the working folder."""
    return [float(sum(name in os.environ for name in ("SECRET_TOKEN", "RANK")) + len(os.listdir(".")))]


# --- marked as running code: one process for each call


@hostile(runs_code=True)
def patches(**columns):
    """Replace what scores the next completions."""
    builtins.len = lambda _: 99
    builtins.float = lambda _: 99.0
    for name, value in list(sys.modules["grpo.rewards.worker"].__dict__.items()):
        if callable(value) and not name.startswith("_"):
            setattr(sys.modules["grpo.rewards.worker"], name, lambda *_: b"[99.0]")
    os.environ["HOME"] = "/"
    with open("re.py", "w") as file:
        file.write("raise SystemExit")
    return [1.0]


@hostile(runs_code=True)
def forges(**columns):
    """Write an answer into every pipe that is open, and stay to write some more."""
    fake = b"\0\0\0\x06[99.0]"
    if os.fork() == 0:
        os.setsid()
        while True:
            _write_everywhere(fake)
            time.sleep(0.001)
    _write_everywhere(fake)
    time.sleep(0.2)
    return [1.0]


def _write_everywhere(data):
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.set_blocking(fd, False)
            os.write(fd, data)


@hostile(runs_code=True)
def traces(trainer, **columns):
    """Try to reach the workers, the supervisor, the keeper and the trainer; the score is the number of successes."""
    reached, [trainer] = 0, trainer
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if pid != trainer and f"grpo.rewards.supervisor\0{trainer}" not in Path(f"/proc/{pid}/cmdline").read_text():
                continue
            if pid in _own_line():
                continue
            with contextlib.suppress(OSError):
                open(f"/proc/{pid}/mem", "r+b").close()
                reached += 1
            with contextlib.suppress(OSError):
                os.readlink(f"/proc/{pid}/fd/0")
                reached += 1
    return [float(reached)]


def _own_line():
    """Process ids in /proc of this process and of the one that waits for it."""
    own = int(os.readlink("/proc/self"))
    return own, int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1])


@hostile(runs_code=True)
def kills_worker(**columns):
    """Kill the parent; where its id is 0, that is this process's own group."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(float(SECONDS))


@hostile(runs_code=True)
def chokes(namespace, **columns):
    """Lower the file limit of every process in this namespace, so that later calls would fail."""
    if os.stat("/proc/self/ns/pid").st_ino == namespace[0]:
        raise RuntimeError("these are the machine's own processes: not touched")
    for number in range(1, 200):
        with contextlib.suppress(OSError):
            resource.prlimit(number, resource.RLIMIT_NOFILE, (3, 3))
    return [1.0]


@hostile(runs_code=True)
def code_exits(**columns):
    os._exit(0)


@hostile(runs_code=True)
def code_bomb(**columns):
    return bomb.__wrapped__(**columns)


@hostile(runs_code=True)
def code_hangs(**columns):
    time.sleep(float(SECONDS))


calls = 0


def counts(completions, **columns):
    """The number of calls in this process, including this one."""
    global calls
    calls += 1
    return [float(calls)]


counts.runs_code = True
