"""What a CUDA graph does, on a CPU: a step's operators are noted once, with the tensors they were given, and run again.

As on a GPU, nothing that Python decides is decided again, every tensor stays where it was, what a step makes is lost
until the first replay, and whatever would wait for the device or copy to it is refused while the step is noted.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
WAITS = [(torch.Tensor, name) for name in ("cpu", "tolist", "numpy")] + [
    (torch, name) for name in ("tensor", "as_tensor", "from_numpy")
]


class Refused(RuntimeError):
    """Not permitted while a step is noted."""


class Tape(TorchDispatchMode):
    """Notes operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        masks = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1:2])
        )
        if name in REFUSED or masks:
            raise Refused(f"{name} is not permitted while a step is noted")
        made = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.calls.append((func, args, kwargs, fresh))
        return made

    def replay(self) -> None:
        """Run every operator again, into the same tensors."""
        for func, args, kwargs, fresh in self.calls:
            made = func(*args, **kwargs)
            kept = {id(t) for t in fresh}
            if not fresh:
                continue
            again = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
            assert len(again) == len(fresh) == len(kept)
            for old, new in zip(fresh, again, strict=True):
                old.copy_(new)


def spoil(tensor: Tensor) -> None:
    """Nothing has been computed yet."""
    if tensor.numel():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 7)


def note(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """As `capture_cuda` in grpo/rollout/cuda_graph.py."""

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **named: Any) -> Any:
            raise Refused(f"{name} is not permitted while a step is noted")

        return refused

    tape = Tape()
    with ExitStack() as watched:
        for owner, name in WAITS:
            watched.enter_context(patch.object(owner, name, refuse(name)))
        watched.enter_context(tape)
        made = step()
    for _, _, _, fresh in tape.calls:
        for tensor in fresh:
            spoil(tensor)
    return made, tape.replay
