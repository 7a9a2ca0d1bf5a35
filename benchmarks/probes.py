"""Clocks and counters that benchmarks/step_profile.py puts around parts of the trainer, and takes off again.

They watch methods by name: `phase` of a step's tally; of the engine's caches, what computes prompts and `decode`.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from grpo.rollout import caches
from grpo.training.metrics import Tally

PREFILLS = ("join", "prefill")  # what a cache calls the method that computes prompts


class Probes:
    """Clocks and counters, put on and taken off between steps."""

    def __init__(self) -> None:
        self.model: Any = None
        self.stack = [""]  # the phases that we are in
        self.undo: list[tuple[type, str, Any]] = []
        self.hook: Any = None
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.seconds, self.computed, self.calls = Counter(), Counter(), Counter()  # type: ignore[var-annotated]

    def settle(self) -> None:
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def put(self) -> None:
        """Replace the methods that are watched."""
        for kind in (caches.SharedCache, caches.PlainCache):
            [first] = [name for name in PREFILLS if hasattr(kind, name)]
            self._replace(kind, first, self._clocked("prefill", getattr(kind, first)))
            self._replace(kind, "decode", self._clocked("decode", kind.decode))
        self._replace(Tally, "phase", self._phased(Tally.phase))
        self.hook = self.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def take_off(self) -> None:
        """As it was."""
        for kind, name, plain in self.undo:
            setattr(kind, name, plain)
        self.undo.clear()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def _replace(self, kind: type, name: str, new: Any) -> None:
        self.undo.append((kind, name, getattr(kind, name)))
        setattr(kind, name, new)

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if self.stack[-1] != "decode":  # there rows are counted: not every decoder asks the embedding's module
            self.computed[self.stack[-1]] += args[0].numel()

    def _clocked(self, name: str, plain: Any) -> Any:
        def method(cache, first, *args, **named):
            self.settle()
            self.stack.append(name)
            began = time.perf_counter()
            try:
                found = plain(cache, first, *args, **named)
                self.settle()
            finally:
                self.stack.pop()
            self.seconds[name] += time.perf_counter() - began
            self.calls[name] += 1
            if name == "decode":
                self.computed[name] += first.shape[0]
            return found

        return method

    def _phased(self, plain: Any) -> Any:
        @contextlib.contextmanager
        def phase(tally: Tally, name: str) -> Iterator[None]:
            self.settle()
            self.stack.append(name)
            try:
                with plain(tally, name):
                    yield
                    self.settle()
            finally:
                self.stack.pop()

        return phase
