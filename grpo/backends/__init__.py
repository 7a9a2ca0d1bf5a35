"""Backends: who sums gradients over ranks, and who steps the optimizer.

The gradient contract, one sentence, tested on every backend: the loss passed to `backward` is already
divided by the global denominator, and `reduce` leaves on every rank the *sum* over ranks.

`replicated` keeps whole weights on every rank: a single process, or data parallel. Another backend is
another file with the same methods.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """What the policy needs of a backend."""

    def zero(self) -> None:
        """Forget gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    def reduce(self) -> float:
        """Sum gradients over ranks and return their global norm, equal on every rank."""

    def step(self, lr: float, scale: float) -> None:
        """Scale the gradients (clipping) and take one optimizer step at this learning rate."""

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the current weights, whole tensors."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state by parameter name, full precision."""

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `optimizer_state` gave."""
