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
    trained: np.ndarray = None  # type: ignore[assignment]  # [C] bool, tokens that carry loss; not given: all of them

    def __post_init__(self) -> None:
        _fill_trained(self)


def _fill_trained(row: Any) -> None:
    """Every token of a completion was sampled and carries loss, unless something says otherwise."""
    if row.trained is None:
        object.__setattr__(row, "trained", np.ones(len(row.token_ids), bool))
    assert row.trained.shape == (len(row.token_ids),) and row.trained.dtype == bool


FACTS = ("length", "trained", "stopped", "broken", "clamped", "logprob_sum", "failures", "rank")


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
    faults: np.ndarray = None  # type: ignore[assignment]  # [N, K] why a function gave no score; not given: all did

    def __post_init__(self) -> None:
        if self.faults is None:
            object.__setattr__(self, "faults", np.zeros_like(self.scores))

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each completion: what memory and time depend on."""
        return self.facts["length"].astype(np.int64)

    @property
    def num_trained(self) -> np.ndarray:
        """[N] tokens of each completion that carry loss: what the denominators count."""
        return self.facts["trained"].astype(np.int64)

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
    trained: np.ndarray = None  # type: ignore[assignment]  # [C] bool, see Completion

    def __post_init__(self) -> None:
        _fill_trained(self)


@dataclass(frozen=True)
class Flat:
    """A micro-batch as one row without padding, each prompt once (grpo/forward/flat_rows.py)."""

    shared_prompts: Any  # grpo.forward.shared_attention.SharedPrompts
    input_ids: torch.Tensor  # [1, S] int64
    positions: torch.Tensor  # [B, T] int64, where in S each target is predicted; 0 beyond a completion's length


@dataclass(frozen=True)
class MicroBatch:
    """B rows of one backward, padded on the right to their own longest. [B, T] is aligned to targets."""

    rows: tuple[int, ...]  # [B] n of each
    input_ids: torch.Tensor  # [B, L] int64, prompt + completion, without the last token
    positions: torch.Tensor  # [B, T] int64, where in L the token is predicted
    target_ids: torch.Tensor  # [B, T] int64
    lengths: torch.Tensor  # [B] int64, tokens of each completion
    trained: torch.Tensor  # [B, T] bool, True on completion tokens that carry loss
    advantages: torch.Tensor  # [B] float32
    sampler_logprobs: torch.Tensor  # [B, T] float32, 0 beyond a completion's length
    support: torch.Tensor | None = None  # [B, T, K] int64, -1 padded
    old_logprobs: torch.Tensor | None = None  # [B, T]; None: the bare ones, detached
    ref_logprobs: torch.Tensor | None = None  # [B, T]; None: no KL
    weights: torch.Tensor | None = None  # [B, T] loss weights, divided by the global denominator
    position_ids: torch.Tensor | None = None  # [B, L] int64, from 0 in each of the texts that share a row; None: 0 to L
    flat: Flat | None = None  # the same rows without padding; None: made when it is needed
    kept: torch.Tensor | None = None  # [M] int64, places of trained tokens in [B T]; None: found when needed
    head_blocks: int = 1  # blocks of the head to run at least; backends that shard weights need ranks to agree

    def __post_init__(self) -> None:
        num_rows, width = self.target_ids.shape
        assert self.input_ids.shape[0] == num_rows == self.advantages.shape[0] == len(self.rows)
        assert self.trained.shape == self.positions.shape == self.sampler_logprobs.shape == (num_rows, width)
        assert self.trained.dtype == torch.bool and self.lengths.shape == (num_rows,)


@dataclass
class Counters:
    """What the trainer remembers beside weights and optimizer state; saved in every checkpoint."""

    step: int = 0  # steps finished
    updates: int = 0  # optimizer steps taken: the clock of the learning-rate schedule
    skipped_updates: int = 0
    consecutive_skips: int = 0
    trust_sampler: bool | None = None  # sampler log-probs serve as old log-probs; None: not measured yet
