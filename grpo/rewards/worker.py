"""The process that runs the user's file: forked by a supervisor, under its limits, replaced when it is killed.

It reads a header (the calls to make) and a body (prompts, then rows, a frame each), and answers each call as soon as
it is made, so that the supervisor can tell which call is running. A function marked `runs_code` gets a process for
each call: the worker forks after the import, and forwards the one frame that its child wrote without parsing it. Code
in that process cannot reach the worker, so it cannot change later calls.
"""

import contextlib
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.rewards import sandbox
from grpo.rewards.functions import (
    Arguments,
    Loaded,
    Outcome,
    bind,
    call,
    call_together,
    describe,
    find,
    load_module,
    raised,
)
from grpo.rewards.logged import TrainerState
from grpo.rewards.neighbours import Neighbours
from grpo.rewards.protocol import MAX_ANSWER, MAX_REQUEST, cut, dump, frame, load, read_frame, write_all

TICK_S = 0.02


def serve(hello: dict[str, Any], reading: int, writing: int, fork_each: bool) -> None:
    """Import the functions, send their descriptions, then answer calls until the end of the stream."""
    sys.path[:] = hello["path"]
    functions, descriptions = load_functions(hello["functions"], only_code=fork_each)
    write_all(writing, frame(dump(descriptions)))
    if len(functions) != len(hello["functions"]):
        return
    sandbox.limit_memory(hello["memory_mb"])
    while (header := read_frame(reading, MAX_REQUEST)) is not None:
        body = read_frame(reading, MAX_REQUEST)
        assert body is not None
        request = load(header)
        frames = cut(body)
        prompts, rows = frames[: request["num_prompts"]], frames[request["num_prompts"] :]
        state = TrainerState(*request["state"])
        calls = [
            (functions[k], [(prompts[request["prompt_of"][i]], rows[i]) for i in chosen], state)
            for k, chosen in request["calls"]
        ]
        if request["together"]:
            answer_together(calls, hello["timeout_s"], writing)
            continue
        for one in calls:

            def answer(one: tuple[Loaded, list[tuple[bytes, bytes]], TrainerState] = one) -> bytes:
                return dump(make_call(*one))

            write_all(writing, frame(answer_alone(answer, reading, writing) if fork_each else answer()))


def answer_together(
    calls: Sequence[tuple[Loaded, list[tuple[bytes, bytes]], TrainerState]], timeout_s: float, writing: int
) -> None:
    """Await coroutines at the same time, and answer in the order of the calls, each as early as that allows."""
    prepared = [(one, unpack(pairs, state)) for one, pairs, state in calls]
    ended: dict[int, bytes] = {}
    num_written = 0

    def done(i: int, outcomes: list[Outcome] | None) -> None:
        nonlocal num_written
        limit_s = timeout_s * len(calls[i][1])
        ended[i] = dump({"late": limit_s} if outcomes is None else prepared[i][1].log.beside(outcomes))
        while num_written in ended:
            write_all(writing, frame(ended.pop(num_written)))
            num_written += 1

    call_together(prepared, done, [timeout_s * len(pairs) for _, pairs, _ in calls])


def load_functions(wanted: list[dict[str, Any]], only_code: bool = False) -> tuple[list[Loaded], list[dict[str, Any]]]:
    """Import each file once, set parameters. Returns functions and descriptions; on failure only {"error": reason}.

    wanted: see `locate`. only_code: this worker only calls functions that run code, so the others are not prepared.
    """
    modules: dict[str, Any] = {}
    neighbours: dict[str, Neighbours] = {}
    functions: list[Loaded] = []
    descriptions: list[dict[str, Any]] = []
    for one in wanted:
        path = one["path"]
        beside = neighbours.setdefault(path, Neighbours(path, one["module"], one["beside"]))
        try:
            if path not in modules:
                with beside.visible():
                    modules[path] = load_module(one["module"], path, one["text"])
        except BaseException as error:  # whatever the user's file raises at import, SystemExit included
            return functions, [{"error": f"importing {path} raised {raised(error)}.{_advice(error)}"}]
        found = find(modules[path], one["function"])
        if isinstance(found, str):
            return functions, [{"error": f"{os.path.basename(path)} {found}"}]
        with beside.visible():
            described = describe(found, one["name"], one["parameters"])
        if not only_code or described["runs_code"]:
            try:
                with beside.visible():
                    found, more_source = bind(found, one["parameters"])
            except (ValueError, UserError) as error:
                return functions, [{"error": " ".join(f"{one['name']}: {error}".split())}]
            except BaseException as error:  # `prepare` may be the user's: it may raise anything
                return functions, [{"error": f"{one['name']}: preparing it raised {raised(error)}."}]
            described["source"] += more_source
        functions.append(Loaded(found, described["takes"], described["is_async"], beside.visible))
        descriptions.append(described)
    return functions, descriptions


def _advice(error: BaseException) -> str:
    """What to do about an import that failed, where that is known."""
    if isinstance(error, ModuleNotFoundError):
        return f" Install {error.name}, or put {error.name}.py beside that file."
    if isinstance(error, ImportError) and "relative import" in str(error):
        return " A reward file is imported by itself: write `import helpers` for the file helpers.py beside it."
    return ""


def make_call(one: Loaded, pairs: list[tuple[bytes, bytes]], state: TrainerState) -> Any:
    """One call on (prompt, row) pairs of JSON: its answer, also as JSON."""
    arguments = unpack(pairs, state)
    try:
        return arguments.log.beside(call(one, arguments))
    except BaseException as error:  # SystemExit, KeyboardInterrupt, time-outs of libraries: a failure like others
        return [raised(error)] * len(pairs)


def unpack(pairs: list[tuple[bytes, bytes]], state: TrainerState) -> Arguments:
    """The arguments of a call. Each call gets new copies, so a function may change them."""
    prompts, completions, token_ids = [], [], []
    columns: dict[str, list[Any]] = {}
    for prompt_data, row_data in pairs:
        prompt, row_columns = load(prompt_data)
        completion, ids = load(row_data)
        prompts.append(prompt)
        completions.append(completion)
        token_ids.append(ids)
        for key, value in row_columns.items():
            columns.setdefault(key, []).append(value)
    return Arguments(prompts, completions, token_ids, columns, state)


def answer_alone(answer: Callable[[], bytes], *private: int) -> bytes:
    """Run `answer` in a process that cannot reach this one; the fds `private` are closed there.

    That process is the first one of a nested namespace: it cannot address processes outside, and its children die with
    it. It has no privileges, and its own session and working folder.
    """
    folder = tempfile.mkdtemp(dir=os.environ["HOME"])

    def alone() -> bytes:
        for fd in private:
            os.close(fd)
        sandbox.drop_privileges()
        os.setsid()
        enter(folder)
        return answer()

    def nest() -> bytes:
        sandbox.nest()
        return in_child(alone)

    frame_of_child = in_child(nest)
    try:
        os.rmdir(folder)
    except OSError:
        import shutil  # slow to import, rarely needed

        with contextlib.suppress(OSError, RecursionError):  # the folder above is removed at the end
            shutil.rmtree(folder)
    return frame_of_child


def in_child(work: Callable[[], bytes]) -> bytes:
    """The result of `work` in a forked process, which is then killed; without a result, how it ended, as JSON."""
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        sandbox.die_with(parent, signal.SIGKILL)
        os.close(reading)
        write_all(writing, frame(work()))
        os._exit(0)
    os.close(writing)
    status: int | None = None
    while status is None and not select.select([reading], [], [], TICK_S)[0]:
        gone, how = os.waitpid(pid, os.WNOHANG)
        status = how if gone == pid else None
    result = _read_result(reading)
    os.close(reading)
    if status is None:
        os.kill(pid, signal.SIGKILL)  # no effect on a process that has ended: its exit status stays
        status = os.waitpid(pid, 0)[1]
    return result or dump(f"{how_it_ended(status)} before it answered")


def how_it_ended(status: int) -> str:
    """A wait status in words.

    >>> how_it_ended(9)
    'its process was ended by SIGKILL'
    >>> how_it_ended(256)
    'its process ended with exit code 1'
    """
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was ended by {signal.Signals(-code).name}"


def _read_result(reading: int) -> bytes:
    """The frame that the child wrote; empty if it wrote none, or something else."""
    if not select.select([reading], [], [], 0)[0]:
        return b""
    try:
        return read_frame(reading, MAX_ANSWER) or b""
    except ValueError:
        return b""


def enter(folder: str) -> None:
    """Make it the working folder, home and folder of temporary files."""
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def stay_in_session() -> None:
    """Ignore signals meant for the trainer; children of this process handle them as usual."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN, which an exec would inherit
        os.register_at_fork(after_in_child=lambda number=number: signal.signal(number, signal.SIG_DFL))
