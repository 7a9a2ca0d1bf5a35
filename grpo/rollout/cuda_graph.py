"""A decode step as a CUDA graph: all its kernels with one launch.

On a GPU a decode step of a small model, or of few rows, waits for Python to launch hundreds of short kernels. A graph
records these launches with the addresses of their tensors, so that whatever changes from token to token must be in
tensors that stay in place: the token ids, and the time and columns of row_buffer.py. When rows join or leave, or a
buffer is replaced, the graph is dropped; a new one is captured once the new shape has lasted a few steps.

The simple path is the same step, launched kernel by kernel. The first graph of each kind is compared with it; before,
the step runs once with device syncs forbidden, because a capture allows none. Where the capture fails or the results
differ, a warning is given and every step is launched kernel by kernel. Where memory does not suffice for a graph, the
rows continue without one until their shape changes.
"""

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo.runtime.out_of_memory import ran_out

WARM_STEPS = 2  # of a shape before its graph is captured; they also allocate what lives longer than a step
MIN_ALIKE = 0.9  # share of values that must agree with the step; a few draws may differ by rounding
TOLERANCE = 1e-3  # of a value, relative or absolute; token ids are equal or not

T = TypeVar("T")
Capture = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Record the launches of a function: its result, and a function that launches them again into the same tensors."""


def capture_cuda(step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Capture a CUDA graph; nothing is computed before the first replay."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (NCCL's watchdog, a checkpoint's writer) may call CUDA during the capture. The outer
    # context restores the stream after a capture that fails; torch.cuda.graph does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return result, graph.replay


@contextmanager
def no_device_sync(device: torch.device) -> Iterator[None]:
    """Make a device sync an error. Here the error is harmless; within a capture it may leave CUDA unusable."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepGraph:
    """The decode step of the current rows: launched kernel by kernel at first, then replayed."""

    def __init__(self, capture: Capture = capture_cuda):
        self.capture = capture
        self.usable = True
        self.checked: set[Hashable] = set()  # kinds whose first graph agreed with the step
        self.captures = self.replays = 0
        self.forget()

    def forget(self) -> None:
        """Drop the graph. Call it before tensors of the step are replaced: the graph keeps them in memory."""
        self.calls = 0  # with the current shape
        self.too_large = False
        self.on_logits: Callable[[Tensor], Any] | None = None
        self.result: Any = None
        self.replay: Callable[[], None] | None = None
        self.token_ids: Tensor | None = None

    def run(
        self,
        logits_of: Callable[[Tensor], Tensor],
        on_logits: Callable[[Tensor], T],
        token_ids: Tensor,
        kind: Hashable,
    ) -> T:
        """on_logits(logits_of(token_ids)), in tensors that the caller owns.

        kind: equal for steps that take the same path through the code. Both functions must return the same when they
        are called twice, without a device sync.
        """
        if on_logits != self.on_logits:
            self.forget()
            self.on_logits = on_logits
        self.calls += 1
        if self.usable and self.replay is None and self.calls > WARM_STEPS and not self.too_large:
            self._capture(lambda ids: on_logits(logits_of(ids)), token_ids.clone(), kind)
        if self.replay is None or self.token_ids is None:
            return on_logits(logits_of(token_ids))
        self.token_ids.copy_(token_ids)
        self.replay()
        self.replays += 1
        return _copied(self.result)

    def _capture(self, step: Callable[[Tensor], Any], token_ids: Tensor, kind: Hashable) -> None:
        expected, problem = None, ""
        try:
            # the first graph of a kind: the step itself, to compare with
            if kind not in self.checked:
                with no_device_sync(token_ids.device):
                    expected = step(token_ids)
            result, replay = self._captured(step, token_ids)
            if replay is not None and expected is not None:
                replay()
                problem = "" if _alike(expected, result) else "it gives other numbers"
        except RuntimeError as error:
            if ran_out(error):
                raise
            problem = _first_error(error)
        if problem:
            self.usable = False
            warnings.warn(
                f"decode steps are launched kernel by kernel, not as a CUDA graph ({problem[:200]}): slower, same "
                "numbers. `cuda_graphs: false` leaves the attempt out.",
                stacklevel=2,
            )
        elif replay is not None:
            self.checked.add(kind)
            self.captures += 1
            self.result, self.replay, self.token_ids = result, replay, token_ids

    def _captured(self, step: Callable[[Tensor], Any], token_ids: Tensor) -> tuple[Any, Callable[[], None] | None]:
        try:
            return self.capture(lambda: step(token_ids))
        except RuntimeError as error:
            if not ran_out(error):
                raise
        self.too_large = True  # a graph needs memory of its own; without it the step fits
        return None, None


def _first_error(error: BaseException) -> str:
    """The cause: the error that ends a capture only says that one occurred."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        result = tuple(getattr(result, field.name) for field in dataclasses.fields(result))
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple) else []


def _copied(result: Any) -> Any:
    """The same in new tensors, which the next replay does not overwrite."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, tuple):
        return tuple(_copied(part) for part in result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        copies = {field.name: _copied(getattr(result, field.name)) for field in dataclasses.fields(result)}
        return dataclasses.replace(result, **copies)
    return result


def _alike(expected: Any, found: Any) -> bool:
    """Whether at least MIN_ALIKE of the values of each tensor agree."""
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    shares = [_equal(a, b).double().mean() for a, b in pairs]
    return bool(torch.stack(shares).min() >= MIN_ALIKE)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.isclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True) if a.is_floating_point() else a == b
