"""Unit tests for Python that a model wrote: the share that passes.

The code and its tests never share a process. For each test two are started:

    the code     solution_process.py: confined by limits, and by Landlock where the kernel has it
    the test     a fork of the call's process; names of the code stand there for requests over a pipe

A test sees plain data (numbers, texts, lists, ...), whatever the code returns, so a result that claims to equal
everything equals nothing, and what the code does to builtins, unittest or its own process changes no verdict. A program
that reads standard input and prints is compared by what it printed.
"""

import builtins
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo.reward_library import solution_process
from grpo.reward_library.parameters import check_number, check_text, check_whole, declare
from grpo.reward_library.solution_process import MAX_FRAME
from grpo.reward_library.unit_test_cases import Case, last_code, read_tests
from grpo.reward_library.unit_test_remotes import RemoteModule, Remotes
from grpo.rewards import completion_text, sandbox

PASSED, FAILED, UNUSABLE = b"P", b"F", b"U"  # what a test's process says; the last: the code does not load
MAX_PROCESSES = 16  # of the code
TICK_S = 0.02


def unit_test_reward(
    completions: Sequence[Any], *, column: str = "tests", timeout_s: float = 2.0, total_s: float = 8.0,
    memory_mb: int = 512, **columns: Any,
) -> list[float]:  # fmt: skip
    """Share of the unit tests in `column` that the code passes: that of the last closed ``` fence, 0.0 without one.

    The column holds Python (each top-level assert, function test_... and method of a TestCase is a test; without them
    all of it is one), a list of such texts (each is one test), or inputs and outputs of a program: a list of
    {"input", "output"}, {"inputs": [...], "outputs": [...]}, or {"test_cases": [...]}; all also as JSON. A test has
    `timeout_s`, all together `total_s`; those after that do not pass. Docs: what it protects against.
    """
    if column not in columns:
        raise ValueError(f"the data has no column {column!r}; name it in reward_parameters: column")
    entry_points = columns.get("entry_point") or [None] * len(completions)
    scores = []
    for completion, given, entry_point in zip(completions, columns[column], entry_points, strict=True):
        tests = read_tests(given, entry_point)
        code = last_code(completion_text(completion))
        scores.append(share_passed(code, tests, timeout_s, total_s, memory_mb) if code is not None else 0.0)
    return scores


unit_test_reward.runs_code = True  # type: ignore[attr-defined]
unit_test_reward.if_ended = 0.0  # type: ignore[attr-defined]


def share_passed(code: str, tests: Sequence[Case], timeout_s: float, total_s: float, memory_mb: int) -> float:
    """Run the tests one after the other."""
    inside = os.getpid() == 1  # a namespace, which ends all
    if inside:
        sandbox.hide()
    else:
        sandbox.adopt_orphans()  # a process whose parent has ended stays a descendant, and is found
    try:
        ends = time.monotonic() + total_s
        num_passed = 0
        for test in tests:
            left_s = min(timeout_s, ends - time.monotonic())
            if left_s <= 0:
                break
            what = {"code": code, "as_program": test.code is None, "seconds": int(left_s) + 1, "memory_mb": memory_mb}
            verdict = (_run_program if test.code is None else _run_test)(what, test, left_s)
            num_passed += verdict == PASSED
            if verdict == UNUSABLE:
                break
        return num_passed / len(tests)
    finally:
        if not inside:
            sandbox.adopt_orphans(False)


def _start(what: dict[str, Any], stdin: Any, stdout: Any, pipes: tuple[int, ...] = ()) -> subprocess.Popen:
    """Start the code's process; `pipes`: where it reads requests and writes replies."""
    reading, writing = os.pipe()
    fds = (reading, *pipes)
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(Path(solution_process.__file__)), *map(str, fds)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,
        env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
    )
    os.close(reading)
    with contextlib.suppress(OSError):  # it has ended already
        solution_process.write(writing, what)
    os.close(writing)
    return process


def _wait(ended: Callable[[float], bool], within_s: float, before: set[int]) -> bool:
    """Whether it ends in time, and has not started too many processes."""
    deadline = time.monotonic() + within_s
    while not ended(TICK_S):
        if time.monotonic() > deadline or len(set(sandbox.descendants()) - before) > MAX_PROCESSES:
            return False
    return True


def _end(process: subprocess.Popen, before: set[int]) -> None:
    """Kill it and what it started."""
    if os.getpid() == 1:  # of a namespace, whose processes /proc may number otherwise
        with contextlib.suppress(OSError):
            os.kill(-1, signal.SIGKILL)
    else:
        killed: set[int] = set()
        for _ in range(5):  # they may be forking
            for pid in set(sandbox.descendants()) - before:
                killed.add(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pid in killed:
            with contextlib.suppress(OSError):  # it has been waited for
                os.waitpid(pid, 0)
    process.wait()
    with contextlib.suppress(OSError):
        while os.getpid() == 1 and os.waitpid(-1, os.WNOHANG)[0]:  # orphans
            pass


def _run_program(what: dict[str, Any], test: Case, within_s: float) -> bytes:
    """Run the code as a program on the test's input."""
    before = set(sandbox.descendants())
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
        given.write(test.given.encode())
        given.seek(0)
        process = _start(what, given, printed)

        def ended(tick_s: float) -> bool:
            try:
                process.wait(tick_s)
            except subprocess.TimeoutExpired:
                return False
            return True

        in_time = _wait(ended, within_s, before)
        _end(process, before)
        printed.seek(0)
        text = printed.read(MAX_FRAME)
    same = _lines(text.decode("utf-8", "replace")) == _lines(test.expected)
    return PASSED if in_time and process.returncode == 0 and same else FAILED


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _run_test(what: dict[str, Any], test: Case, within_s: float) -> bytes:
    """Run the code's process, and the test in another one that asks it."""
    before = set(sandbox.descendants())
    to_code, requests = os.pipe()
    replies, from_code = os.pipe()
    verdict, says = os.pipe()
    process = _start(what, subprocess.DEVNULL, subprocess.DEVNULL, (to_code, from_code))
    os.close(to_code)
    os.close(from_code)
    asking = os.fork()
    if asking == 0:
        try:
            os.close(verdict)
            sandbox.hide()
            _be_the_test(test, Remotes(requests, replies), says)
        finally:
            os._exit(1)
    for fd in (requests, replies, says):
        os.close(fd)
    _wait(lambda tick_s: bool(select.select([verdict], [], [], tick_s)[0]), within_s, before)
    said = os.read(verdict, 1) if select.select([verdict], [], [], 0)[0] else FAILED
    os.close(verdict)
    os.kill(asking, signal.SIGKILL)
    os.waitpid(asking, 0)
    _end(process, before)
    return said or FAILED


def _be_the_test(test: Case, remotes: Remotes, says: int) -> None:
    """Run one test with the code's names, and say how it went."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    names = remotes.names()
    if names is None:
        os.write(says, UNUSABLE)
        return
    module = RemoteModule(remotes)
    sys.modules[module.__name__] = module
    scope: dict[str, Any] = {"__name__": "test"}
    for name in names:
        if not hasattr(builtins, name):  # a sorted() of the code must not judge it
            with contextlib.suppress(AttributeError, RuntimeError):  # such as a module that is not passed on
                scope[name] = getattr(module, name)
    assert test.code is not None
    exec(test.code, scope)
    os.write(says, PASSED)


def _prepare(column: Any, timeout_s: Any, total_s: Any, memory_mb: Any) -> None:
    check_text("column", column)
    check_number("timeout_s", timeout_s, 0, 3600, "above 0 and below 3600")
    check_number("total_s", total_s, 0, 3600, "above 0 and below 3600")
    check_whole("memory_mb", memory_mb, 16, 2**20)


declare(unit_test_reward, _prepare)
