"""A decode step as a CUDA graph: all its kernels with one launch.

On a GPU a decode step of a small model, or of few rows, waits for Python to launch hundreds of short kernels. A graph
holds them as they were launched once, with the addresses they were given; so whatever changes from token to token lies
in tensors that stay where they are: the token ids, the clock and the columns of row_buffer.py. When rows come or go,
or a buffer is exchanged, the graph is forgotten, and made anew once the new shape has lasted a few steps.

The first graph is compared with the step itself; where it differs, or cannot be made, a notice says so and every step
is launched kernel by kernel.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo.out_of_memory import ran_out

WARM_STEPS = 2  # of a shape, before its graph is made: they also allocate what lives longer than a step
MIN_ALIKE = 0.9  # share of numbers that the first graph must have in common with the step
TOLERANCE = 1e-3  # of a number, relative or absolute

T = TypeVar("T")
Capture = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Run a function once for its launches: what it returned, and how to launch them again into the same tensors."""


def capture_cuda(step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """As a CUDA graph. Nothing is computed until it is replayed."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (NCCL's watchdog, a checkpoint's writer) may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = step()
    return made, graph.replay


class StepGraph:
    """The decode step of the rows that are here now: launched kernel by kernel at first, then replayed."""

    def __init__(self, capture: Capture = capture_cuda):
        self.capture = capture
        self.usable = True
        self.checked = False
        self.captures = self.replays = 0  # so far
        self.forget()

    def forget(self) -> None:
        """Something that the graph has the address of is about to go."""
        self.calls = 0
        self.then: Callable[[Tensor], Any] | None = None
        self.made: Any = None
        self.replay: Callable[[], None] | None = None
        self.token_ids: Tensor | None = None

    def run(self, logits_of: Callable[[Tensor], Tensor], then: Callable[[Tensor], T], token_ids: Tensor) -> T:
        """then(logits_of(token_ids)), in tensors of its own.

        Both must give the same again when called twice, and must not ask the device for numbers.
        """
        if then != self.then:
            self.forget()
            self.then = then
        self.calls += 1
        if self.usable and self.replay is None and self.calls > WARM_STEPS:
            self._make(logits_of, then, token_ids)
        if self.replay is None or self.token_ids is None:
            return then(logits_of(token_ids))
        self.token_ids.copy_(token_ids)
        self.replay()
        self.replays += 1
        return _copied(self.made)

    def _make(self, logits_of: Callable[[Tensor], Tensor], then: Callable[[Tensor], T], token_ids: Tensor) -> None:
        here = token_ids.clone()
        expected = None if self.checked else then(logits_of(here))
        problem = ""
        try:
            made, replay = self.capture(lambda: then(logits_of(here)))
            if expected is not None:
                replay()
                if not _alike(expected, made):
                    problem = "it gives other numbers"
        except RuntimeError as error:
            if ran_out(error):
                raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            self.usable = False
            warnings.warn(
                f"decode steps are launched kernel by kernel, not as a CUDA graph ({problem[:200]}): slower, same "
                "numbers. `cuda_graphs: false` leaves the attempt out.",
                stacklevel=2,
            )
            return
        self.checked = True
        self.captures += 1
        self.made, self.replay, self.token_ids = made, replay, here


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
    """Whether nearly all numbers agree: a row whose draw stood on an edge may differ."""
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    shares = [
        torch.isclose(a.double(), b.double(), TOLERANCE, TOLERANCE, equal_nan=True).double().mean() for a, b in pairs
    ]
    return bool(torch.stack(shares).min() >= MIN_ALIKE)
