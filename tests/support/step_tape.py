"""A stand-in for a CUDA graph on CPU: the operators of a step are recorded with their tensors, and run again.

As with a CUDA graph, Python code is not run again, every tensor keeps its address, results do not exist before the
first replay, and device syncs and copies to the device are refused during the recording.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
WAITS = [(torch.Tensor, name) for name in ("cpu", "tolist", "numpy")] + [
    (torch, name) for name in ("tensor", "as_tensor", "from_numpy")
]


class Refused(RuntimeError):
    """Not permitted while a step is recorded."""


class Tape(TorchDispatchMode):
    """Records operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        masks = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1:2])
        )
        if name in SYNCS or masks:
            raise Refused(f"{name} is not permitted while a step is recorded")
        result = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [t for t in tensors if t.untyped_storage().data_ptr() not in given]
        self.calls.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        """Run every operator again, into the same tensors."""
        for func, args, kwargs, fresh in self.calls:
            result = func(*args, **kwargs)
            distinct = {id(t) for t in fresh}
            if not fresh:
                continue
            again = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            assert len(again) == len(fresh) == len(distinct)
            for old, new in zip(fresh, again, strict=True):
                old.copy_(new)


def spoil(tensor: Tensor) -> None:
    """Overwrite a result, which a capture does not compute."""
    if tensor.numel():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 7)


def record(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record a step, as `capture_cuda` in grpo/rollout/cuda_graph.py does."""

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **named: Any) -> Any:
            raise Refused(f"{name} is not permitted while a step is recorded")

        return refused

    tape = Tape()
    with ExitStack() as watched:
        for owner, name in WAITS:
            watched.enter_context(patch.object(owner, name, refuse(name)))
        watched.enter_context(tape)
        result = step()
    for _, _, _, fresh in tape.calls:
        for tensor in fresh:
            spoil(tensor)
    return result, tape.replay
