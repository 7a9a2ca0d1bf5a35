"""How often each question is answered right, and which ones rest for a while: the setting `difficulty_range`.

    rate_q    mean score of q's group by the first reward function; later groups: half the old rate, half the new one
    q rests   for `difficulty_rest` epochs after a group that leaves its rate at or beyond an end of the range

A question that rests is passed over when the stream comes to it. Where all rest, the next one is taken all the same.
"""

import numpy as np
import torch
from torch import Tensor

from grpo.types import Extra

OPEN = -1  # the last epoch of a rest that is over, or never began


class Difficulty(Extra):
    """The state of every question, kept in checkpoints."""

    def __init__(self, num_questions: int, low: float, high: float, rest: int):
        self.low, self.high, self.rest = low, high, rest
        self.rates = np.full(num_questions, np.nan, np.float32)
        self.resting_to = np.full(num_questions, OPEN, np.int64)  # the last epoch of each question's rest

    def rests(self, question: int, epoch: int) -> bool:
        """Whether the question is passed over in this epoch."""
        return bool(epoch <= self.resting_to[question])

    def note(self, question: int, epoch: int, rate: float) -> None:
        """A group of the question was scored; rate: its mean score, NaN where it has none.

        >>> difficulty = Difficulty(2, low=0.0, high=1.0, rest=1)
        >>> difficulty.note(0, epoch=0, rate=1.0), difficulty.note(1, epoch=0, rate=0.5)
        (None, None)
        >>> [difficulty.rests(0, epoch) for epoch in (1, 2)], difficulty.rests(1, 1)
        ([True, False], False)
        """
        if np.isnan(rate):
            return
        known = self.rates[question]
        self.rates[question] = rate if np.isnan(known) else (known + rate) / 2
        if not self.low < self.rates[question] < self.high:
            self.resting_to[question] = epoch + self.rest

    def share_resting(self, epoch: int) -> float:
        """Of all questions, in this epoch."""
        return float((self.resting_to >= epoch).mean())

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the state."""
        return {"rates": torch.tensor(self.rates), "resting_to": torch.tensor(self.resting_to)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The state of a checkpoint. Raises ValueError."""
        for name, own in (("rates", self.rates), ("resting_to", self.resting_to)):
            found = tensors.get(name)
            if found is None or tuple(found.shape) != own.shape or found.dtype != torch.from_numpy(own).dtype:
                raise ValueError(f"{name} is not that of {len(own)} questions")
            own[:] = found.numpy()
        if np.isinf(self.rates).any() or (self.resting_to < OPEN).any():
            raise ValueError("rates or rests are beyond what they can be")
