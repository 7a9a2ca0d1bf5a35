"""The nouns that travel between the parts. Frozen: changing one means making another."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Pulse = Callable[[], bool]  # called for each piece of work done; True: it should be the last, the run was asked to stop


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be asked."""

    data_row: int  # its index in the data, after filtering
    text: str  # exactly what the model reads
    token_ids: tuple[int, ...]
    columns: dict[str, Any]  # the data row, as rewards see it; `answer` holds the gold answer
    messages: list[dict[str, str]] | None = None  # the conversation behind `text`, where there is one
    reference: Any = None  # the answer column's cell as the data has it; `answer` above may be a part of it


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one row."""

    row: int  # n = p*G + g of the step
    token_ids: np.ndarray  # [C] int32, the EOS included when it was sampled
    sampler_logprobs: np.ndarray  # [C] float32, log-prob of each token under the sampling distribution
    finish: str  # "stop" (an EOS was sampled), "length" (cut at the limit), "error" (non-finite logits)
    support: np.ndarray | None = None  # [C, K] int32, ids that truncation kept at each token, -1 padded
    clamped: int = 0  # logits that the clamp moved, summed over the tokens


FACTS = ("length", "stopped", "broken", "clamped", "logprob_sum", "failures", "rank")


class Noticed:
    """What all ranks have to tell each other before an update."""

    notices: np.ndarray  # [W, 2]: asked to stop, weights changed

    @property
    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop: the step's rollouts may be incomplete."""
        return bool(self.notices[:, 0].any())

    @property
    def corrupted_ranks(self) -> list[int]:
        """Ranks whose weights or optimizer state are not what their last update left."""
        return np.flatnonzero(self.notices[:, 1]).tolist()


@dataclass(frozen=True)
class Notices(Noticed):
    """Notices alone, of a step without rollouts."""

    notices: np.ndarray  # [W, 2]


@dataclass(frozen=True)
class Table(Noticed):
    """One row per completion of the step; column k of `scores` belongs to the k-th reward function."""

    names: list[str]
    scores: np.ndarray  # [N, K] float64, NaN where a function does not apply
    rewards: np.ndarray  # [N] weighted sums, NaN where none applies
    facts: dict[str, np.ndarray]  # [N] each, see FACTS
    num_generations: int
    notices: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # [W, 2]: asked to stop, weights changed

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each completion."""
        return self.facts["length"].astype(np.int64)

    @property
    def sampled_by(self) -> np.ndarray:
        """[N] the rank that sampled each row."""
        return self.facts["rank"].astype(np.int64)

    @property
    def grouped(self) -> np.ndarray:
        """[P, G] rewards."""
        return self.rewards.reshape(-1, self.num_generations)

    @property
    def any_broken(self) -> bool:
        """Whether any row met logits that were not finite: its step must not be trained on."""
        return bool(self.facts["broken"].any())


@dataclass(frozen=True)
class TrainRow:
    """One row as the update needs it: a prompt, a completion, its advantage."""

    row: int
    prompt_ids: tuple[int, ...]
    token_ids: np.ndarray  # [C] int32
    sampler_logprobs: np.ndarray  # [C] float32
    support: np.ndarray | None  # [C, K] int32
    advantage: float


@dataclass(frozen=True)
class Flat:
    """A micro-batch as one row without padding, each prompt once (grpo/forward/flat_rows.py)."""

    forest: Any  # grpo.forward.shared_attention.Forest: who belongs to whom
    input_ids: torch.Tensor  # [1, S] int64
    positions: torch.Tensor  # [B, T] int64, where in S each target is predicted; 0 outside the mask


@dataclass(frozen=True)
class MicroBatch:
    """B rows of one backward, padded on the right to their own longest. [B, T] is aligned to targets."""

    rows: tuple[int, ...]  # [B] n of each
    input_ids: torch.Tensor  # [B, L] int64, prompt + completion, without the last token
    positions: torch.Tensor  # [B, T] int64, where in L the token is predicted
    target_ids: torch.Tensor  # [B, T] int64
    mask: torch.Tensor  # [B, T] bool, True on completion tokens
    advantages: torch.Tensor  # [B] float32
    sampler_logprobs: torch.Tensor  # [B, T] float32, 0 outside the mask
    support: torch.Tensor | None = None  # [B, T, K] int64, -1 padded
    old_logprobs: torch.Tensor | None = None  # [B, T]; None: the bare ones, detached
    ref_logprobs: torch.Tensor | None = None  # [B, T]; None: no KL
    weights: torch.Tensor | None = None  # [B, T] loss weights, divided by the global denominator
    position_ids: torch.Tensor | None = None  # [B, L] int64, from 0 in each of the texts that share a row; None: 0 to L
    flat: Flat | None = None  # the same rows without padding; None: made when it is needed
    kept: torch.Tensor | None = None  # [M] int64, places of the mask's True in [B T]; None: found when it is needed
    head_blocks: int = 1  # blocks of the head to run at least; backends that shard weights need ranks to agree

    def __post_init__(self) -> None:
        num_rows, width = self.target_ids.shape
        assert self.input_ids.shape[0] == num_rows == self.advantages.shape[0] == len(self.rows)
        assert self.mask.shape == self.positions.shape == self.sampler_logprobs.shape == (num_rows, width)
        assert self.mask.dtype == torch.bool


@dataclass
class Counters:
    """What the trainer remembers beside weights and optimizer state; saved in every checkpoint."""

    step: int = 0  # steps finished
    updates: int = 0  # optimizer steps taken: the clock of the learning-rate schedule
    skipped_updates: int = 0
    consecutive_skips: int = 0
    trust_sampler: bool | None = None  # sampler log-probs serve as old log-probs; None: not measured yet
