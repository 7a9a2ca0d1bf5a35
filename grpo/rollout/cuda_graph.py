"""A decode step as a CUDA graph: all its kernels with one launch.

On a GPU a decode step of a small model, or of few rows, waits for Python to launch hundreds of short kernels. A graph
holds them as they were launched once, with the addresses they were given; so whatever changes from token to token lies
in tensors that stay where they are: the token ids, the clock and the columns of row_buffer.py. When rows come or go,
or a buffer is exchanged, the graph is forgotten, and made anew once the new shape has lasted a few steps.

The first graph of each kind is compared with the step itself, which is tried without leave to wait for the device, as
no graph may. Where a graph cannot be made, or gives other numbers, a notice says so and every step is launched kernel
by kernel; where memory does not suffice for one, the rows go on without, until their shape changes.
"""

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo.runtime.out_of_memory import ran_out

WARM_STEPS = 2  # of a shape, before its graph is made: they also allocate what lives longer than a step
MIN_ALIKE = 0.9  # share of numbers that a graph must have in common with the step: a draw may stand on an edge
TOLERANCE = 1e-3  # of a number, relative or absolute; token ids are equal or not

T = TypeVar("T")
Capture = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Run a function once for its launches: what it returned, and how to launch them again into the same tensors."""


def capture_cuda(step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """As a CUDA graph. Nothing is computed until it is replayed."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (NCCL's watchdog, a checkpoint's writer) may call CUDA meanwhile. The outer context
    # comes back to the stream also where a capture fails, which torch.cuda.graph itself does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = step()
    return made, graph.replay


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Make it an error to wait for the device: found so, it is harmless; while a graph is made, it may not be."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepGraph:
    """The decode step of the rows that are here now: launched kernel by kernel at first, then replayed."""

    def __init__(self, capture: Capture = capture_cuda):
        self.capture = capture
        self.usable = True
        self.checked: set[Hashable] = set()  # kinds
        self.captures = self.replays = 0  # so far
        self.forget()

    def forget(self) -> None:
        """Something that the graph has the address of is about to go. Call before it does: a graph keeps it alive."""
        self.calls = 0
        self.too_large = False
        self.then: Callable[[Tensor], Any] | None = None
        self.made: Any = None
        self.replay: Callable[[], None] | None = None
        self.token_ids: Tensor | None = None

    def run(
        self, logits_of: Callable[[Tensor], Tensor], then: Callable[[Tensor], T], token_ids: Tensor, kind: Hashable
    ) -> T:
        """then(logits_of(token_ids)), in tensors of its own. kind: of steps that go the same ways.

        Both must give the same again when called twice, and must not ask the device for numbers.
        """
        if then != self.then:
            self.forget()
            self.then = then
        self.calls += 1
        if self.usable and self.replay is None and self.calls > WARM_STEPS and not self.too_large:
            self._make(lambda ids: then(logits_of(ids)), token_ids.clone(), kind)
        if self.replay is None or self.token_ids is None:
            return then(logits_of(token_ids))
        self.token_ids.copy_(token_ids)
        self.replay()
        self.replays += 1
        return _copied(self.made)

    def _make(self, step: Callable[[Tensor], Any], token_ids: Tensor, kind: Hashable) -> None:
        expected, problem = None, ""
        try:
            if kind not in self.checked:
                with no_waiting(token_ids.device):
                    expected = step(token_ids)
            made, replay = self._captured(step, token_ids)
            if replay is not None and expected is not None:
                replay()
                problem = "" if _alike(expected, made) else "it gives other numbers"
        except RuntimeError as error:
            if ran_out(error):
                raise
            problem = _words(error)
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
            self.made, self.replay, self.token_ids = made, replay, token_ids

    def _captured(self, step: Callable[[Tensor], Any], token_ids: Tensor) -> tuple[Any, Callable[[], None] | None]:
        try:
            return self.capture(lambda: step(token_ids))
        except RuntimeError as error:
            if not ran_out(error):
                raise
        self.too_large = True  # a graph's memory is its own; the step itself has fitted
        return None, None


def _words(error: BaseException) -> str:
    """Of the first that went wrong: what ends a capture only says that something did."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _tensors(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    if dataclasses.is_dataclass(made):
        made = tuple(getattr(made, field.name) for field in dataclasses.fields(made))
    return [tensor for part in made for tensor in _tensors(part)] if isinstance(made, tuple) else []


def _copied(made: Any) -> Any:
    """The same, in tensors that the next replay leaves alone."""
    if isinstance(made, Tensor):
        return made.clone()
    if isinstance(made, tuple):
        return tuple(_copied(part) for part in made)
    if dataclasses.is_dataclass(made) and not isinstance(made, type):
        return dataclasses.replace(made, **{f.name: _copied(getattr(made, f.name)) for f in dataclasses.fields(made)})
    return made


def _alike(expected: Any, found: Any) -> bool:
    """Whether nearly all numbers agree."""
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    shares = [_equal(a, b).double().mean() for a, b in pairs]
    return bool(torch.stack(shares).min() >= MIN_ALIKE)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.isclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True) if a.is_floating_point() else a == b
