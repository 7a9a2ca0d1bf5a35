"""Backends: they sum gradients over ranks and step the optimizer.

The gradient contract, tested on every backend: the loss passed to `backward` is already divided by the global
denominator, and the optimizer steps on the *sum* of gradients over ranks.

ddp.py keeps whole weights on every rank (one process, or data parallel); deepspeed.py shards with DeepSpeed's ZeRO. A
new backend NAME is one file, NAME.py in this folder, and its name among the values of `backend` in
grpo/config/settings.py. The file holds a class with the methods of `Backend` below and a function
open_backend(cfg, world, scorer) that returns one; it is imported only when a run uses it.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.runtime.distributed import World
from grpo.types import MicroBatch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one parameter's flattened optimizer moment, on this rank."""

    name: str  # of the parameter
    moment: str  # one of MOMENTS
    start: int  # first element
    values: Tensor  # [n]


ReadMoment = Callable[[str, str, int, int], Tensor]  # name, moment, start, length -> [length]


class Backend(Protocol):
    """The interface that the policy uses."""

    even_work: bool
    """Whether every rank must run equally many micro-batches and blocks of the head, because each is a collective."""

    def score(self, micro: MicroBatch) -> Tensor:
        """Log-probs [B, T] of the trained model."""

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient. last: it is the last one of its minibatch."""

    def step(self, lr: float, max_norm: float) -> float:
        """Sum gradients over ranks, clip, step. Returns the norm before clipping, equal on every rank.

        When the norm is not finite, weights and moments stay unchanged on every rank.
        """

    def forget(self) -> None:
        """Drop the gradients added since the last step. Only where `even_work` is False."""

    def local_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's tensors between updates: weights (or its shard of them) and optimizer state."""

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the current weights, whole tensors. Every rank must iterate to the end."""

    def moments(self) -> Iterable[Piece]:
        """This rank's part of the optimizer state; the parts of all ranks are the whole."""

    def load_moments(self, read: ReadMoment, updates: int) -> None:
        """Load this rank's part through `read`, which reads the whole, after `updates` optimizer steps."""


def load_backend(cfg: Config, world: World, scorer: Scorer) -> Backend:
    """Open the backend of the configuration. Raises UserError."""
    if cfg.backend == "single" and world.size > 1:
        raise UserError(f"backend: single is for one process, got {world.size}. Use ddp or deepspeed.")
    name = "ddp" if cfg.backend == "single" else cfg.backend
    return importlib.import_module(f"{__name__}.{name}").open_backend(cfg, world, scorer)
