"""The data that travels between the parts of a step. Frozen, but for the counters: a change makes a new object."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

Pulse = Callable[[], bool]  # called after each piece of work; True: end soon, the run got a stop signal


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenized."""

    data_row: int  # its index in the data, after filtering
    text: str  # exactly what the model gets, before tokenization
    token_ids: tuple[int, ...]
    columns: dict[str, Any]  # the data row, as rewards get it; `answer` holds the gold answer
    messages: list[dict[str, str]] | None = None  # the conversation behind `text`, where there is one
    reference: Any = None  # the answer column's cell in the data; columns["answer"] may be a part of it


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one row."""

    row: int  # n = p*G + g of the step
    token_ids: np.ndarray  # [C] int32, the EOS included when it was sampled
    sampler_logprobs: np.ndarray  # [C] float32, log-prob of each token under the sampling distribution
    finish: str  # "stop" (an EOS or a stop string), "length" (cut at the limit), "error" (non-finite logits)
    support: np.ndarray | None = None  # [C, K] int32, ids that each token was drawn from, -1 padded; None: all ids
    clamped: int = 0  # logits that the clamp moved, summed over the tokens
    trained: np.ndarray = None  # type: ignore[assignment]  # [C] bool, tokens that carry loss; None: all
    entropy: np.ndarray | None = None  # [C] float32 nats, of each token's sampling distribution; None: not recorded

    def __post_init__(self) -> None:
        _fill_trained(self)

    def without_loss(self) -> "Completion":
        """The same with no token that carries loss."""
        return replace(self, trained=np.zeros_like(self.trained))


def _fill_trained(row: Any) -> None:
    """Replace `trained` by all True where it was not given."""
    if row.trained is None:
        object.__setattr__(row, "trained", np.ones(len(row.token_ids), bool))
    assert row.trained.shape == (len(row.token_ids),) and row.trained.dtype == bool


# of a row: tokens, trained tokens, ended by itself, logits not finite, logits clamped, sums of log-probs and recorded
# entropies, failed rewards, the rank that sampled it
FACTS = ("length", "trained", "stopped", "broken", "clamped", "logprob_sum", "entropy_sum", "failures", "rank")


@dataclass(frozen=True)
class Notices:
    """What every rank reports to all ranks before an update."""

    by_rank: np.ndarray  # [W, 2], not 0: it got a stop signal; its weights or optimizer state changed by themselves

    @property
    def stop_requested(self) -> bool:
        """Whether any rank got a stop signal: the step's rollouts may be incomplete."""
        return bool(self.by_rank[:, 0].any())

    @property
    def corrupted_ranks(self) -> list[int]:
        """Ranks whose weights or optimizer state are not what their last update left."""
        return np.flatnonzero(self.by_rank[:, 1]).tolist()


@dataclass(frozen=True)
class Table:
    """One row per completion of the step, the same on every rank; N = P*G rows, K reward functions."""

    names: list[str]  # [K] of the reward functions
    scores: np.ndarray  # [N, K] float64, NaN where a function does not apply
    rewards: np.ndarray  # [N] weighted sums, NaN where none applies
    facts: dict[str, np.ndarray]  # [N] each, see FACTS
    num_generations: int
    notices: Notices = Notices(np.zeros((0, 2)))
    faults: np.ndarray = None  # type: ignore[assignment]  # [N, K] 0, FAILED or LATE (training/scoring.py); None: all 0
    reward_weights: tuple[float, ...] = ()  # [K]

    def __post_init__(self) -> None:
        if self.faults is None:
            object.__setattr__(self, "faults", np.zeros_like(self.scores))

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each completion, on which memory and time depend."""
        return self.facts["length"].astype(np.int64)

    @property
    def num_trained(self) -> np.ndarray:
        """[N] tokens of each completion that carry loss; the denominators count these."""
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
        """Whether logits of any row were not finite: the step must not be trained on."""
        return bool(self.facts["broken"].any())


@dataclass(frozen=True)
class TrainRow:
    """One row of the update: a prompt, a completion, its advantage."""

    row: int  # n = p*G + g of the step
    prompt_ids: tuple[int, ...]
    token_ids: np.ndarray  # [C] int32
    sampler_logprobs: np.ndarray  # [C] float32
    support: np.ndarray | None  # [C, K] int32
    advantage: float
    trained: np.ndarray = None  # type: ignore[assignment]  # [C] bool, see Completion
    chosen: np.ndarray | None = None  # [C] bool, see MicroBatch

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
    """B rows of one backward, padded on the right to the longest of them. [B, T]: column t is completion token t."""

    rows: tuple[int, ...]  # [B] row n of each
    input_ids: torch.Tensor  # [B, L] int64, prompt + completion, without the last token
    positions: torch.Tensor  # [B, T] int64, where in L the token is predicted
    target_ids: torch.Tensor  # [B, T] int64
    lengths: torch.Tensor  # [B] int64, tokens of each completion
    trained: torch.Tensor  # [B, T] bool, True on completion tokens that carry loss
    advantages: torch.Tensor  # [B] float32
    sampler_logprobs: torch.Tensor  # [B, T] float32, 0 beyond a completion's length
    support: torch.Tensor | None = None  # [B, T, K] int64, -1 padded
    old_logprobs: torch.Tensor | None = None  # [B, T]; None: those of the update's own forward, detached
    ref_logprobs: torch.Tensor | None = None  # [B, T]; None: no KL
    weights: torch.Tensor | None = None  # [B, T] loss weights, divided by the global denominator
    entropy: torch.Tensor | None = None  # [B, T] nats, before the step's first update; None: not needed
    chosen: torch.Tensor | None = None  # [B, T] bool, the tokens of top_entropy_share; None: all
    entropy_weights: torch.Tensor | None = None  # [B, T] of the entropy in its bonus, as `weights`; None: no bonus
    position_ids: torch.Tensor | None = None  # [B, L] int64, from 0 in each of the texts that share a row; None: 0 to L
    flat: Flat | None = None  # the same rows without padding; None: computed when needed
    trained_index: torch.Tensor | None = None  # [M] int64, where `trained` is True in [B*T]; None: computed when needed
    head_blocks: int = 1  # blocks of the head to run at least; equal on all ranks where each is a collective

    def __post_init__(self) -> None:
        num_rows, width = self.target_ids.shape
        assert self.input_ids.shape[0] == num_rows == self.advantages.shape[0] == len(self.rows)
        assert self.trained.shape == self.positions.shape == self.sampler_logprobs.shape == (num_rows, width)
        assert self.trained.dtype == torch.bool and self.lengths.shape == (num_rows,)


@dataclass
class Counters:
    """State of training beside weights and optimizer state; saved in every checkpoint."""

    step: int = 0  # steps finished
    updates: int = 0  # optimizer steps taken: the clock of the learning-rate schedule
    skipped_updates: int = 0
    consecutive_skips: int = 0
    trust_sampler: bool | None = None  # sampler log-probs serve as old log-probs; None: not measured yet
    drawn: int = 0  # prompts taken from the run's stream
    entropy_coef: float | None = None  # as entropy_target has adapted it; None: as the setting says
    last_entropy: float | None = None  # nats, mean at the last update with entropy_target; None: not measured yet


class Extra:
    """More state that checkpoints keep: trainer/NAME.safetensors, see Policy.extras."""

    def gather(self, counters: Counters) -> None:
        """Called on every rank before a save, where ranks hold different parts."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy, on CPU. Called on rank 0."""
        raise NotImplementedError

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse, on every rank. Raises ValueError for tensors of something else."""
        raise NotImplementedError
