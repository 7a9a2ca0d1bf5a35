"""Coroutines among reward functions: awaited in one event loop of the process, those of a batch at the same time.

The loop lives as long as the process, so a client that a function keeps from one call to the next stays usable.
"""

import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

BEAT_S = 0.1
CANCELLED_S = 1.0  # how long calls have to end once they are cancelled
AT_ONCE = 64  # calls

_loops: dict[int, Any] = {}  # by process: a fork must not use its parent's


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def wait_for(result: Awaitable[Any]) -> Any:
    """What it returns."""

    async def finish() -> Any:
        return await result

    return _loop().run_until_complete(finish())


def _loop() -> Any:
    import asyncio  # slow to import, and rarely needed

    if os.getpid() not in _loops:
        _loops[os.getpid()] = asyncio.new_event_loop()
    return _loops[os.getpid()]


def run_together(
    calls: Sequence[Callable[[], Coroutine[Any, Any, Any]]],
    done: Callable[[int, Any], None],
    timeouts_s: Sequence[float] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Make the calls, which must not raise, at the same time; `done` gets the place and the result of each as it ends.

    timeouts_s: of each call; the result of one that is late is None. When `stop` says so, those that run are cancelled
    and have no result.
    """
    import asyncio

    async def one(i: int) -> tuple[int, Any]:
        task = asyncio.ensure_future(calls[i]())
        try:
            ended, _ = await asyncio.wait({task}, timeout=timeouts_s[i] if timeouts_s else None)
            return i, task.result() if ended else None
        finally:
            task.cancel()

    async def all_of_them() -> None:
        waiting, running = list(range(len(calls))), set[asyncio.Future[tuple[int, Any]]]()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.add(asyncio.ensure_future(one(waiting.pop(0))))
            if stop():
                for task in running:
                    task.cancel()
                await asyncio.wait(running, timeout=CANCELLED_S)
                return
            ended, running = await asyncio.wait(running, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                done(*task.result())

    _loop().run_until_complete(all_of_them())
