"""Entropy of tokens: a bonus on it, its adaptive coefficient, and a surrogate on the tokens where it is high.

    H_t     = -sum_v p_v log p_v, nats; p: the sampling distribution (temperature, clamp, support)
    loss   -= lambda * sum over t in S of H_t / |S|

S: the trained tokens of the minibatch on all ranks; its size is a denominator of its own, so the bonus is a mean over
tokens with every `weighting`, as TRL's `entropy_coef`. lambda = entropy_coef, or with `entropy_target`, after update k
whose mean of H over S was h_k (Skywork-OR1, arXiv 2505.22312; TRL's `use_adaptive_entropy`):

    c_k+1   = clamp(c_k + (step if h_k <= target else -step), 0, entropy_coef_max),  c_0 = entropy_coef
    lambda  = c_k if h_k-1 <= target else 0,  step = entropy_coef_step; none in the first update

With `top_entropy_share` rho < 1 the surrogate acts on the tokens with H_t >= the (1 - rho) quantile of H (linear
interpolation) over the minibatch's trained tokens alone (arXiv 2506.01939; TRL's `top_entropy_quantile`), and these are
S. The denominators of `weighting` stay those of all trained tokens; the KL acts on all of them.

The bonus has the entropies of the update's own forward (fused_head.py). Tokens are chosen by those that the engine
recorded when it drew them (sampling.py), before rows move to their ranks, so that no forward is needed and rows with
advantage 0 count without being computed; or, with an engine that records none, by those of a forward before the step's
first update, for which rows with advantage 0 are computed, too.

Differs from TRL: its quantile and its mean are over a micro-batch (on all ranks), here over the minibatch, so neither
depends on how rows are cut; and the choice is made once in a step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.config.settings import Config, updates_per_step
from grpo.forward.logprobs import Scorer
from grpo.rollout.sampling import records_entropy
from grpo.runtime.distributed import World
from grpo.training.backends import Backend
from grpo.training.metrics import Tally, declare
from grpo.types import Completion, Counters, MicroBatch, Table

TIE = 1e-5  # nats: entropies this close count as equal
FIXED_POINT = 2.0**40  # sums over ranks are of whole multiples of 1 / this: exact, so that their order does not matter

declare(means=("entropy/true", "entropy/chosen", "entropy/coef"))


def has_bonus(cfg: Config) -> bool:
    """Whether the loss has an entropy bonus, or may get one from entropy_target."""
    return cfg.entropy_coef > 0 or cfg.entropy_target is not None


def scores_entropy(cfg: Config) -> bool:
    """Whether tokens are chosen by entropies that a forward has to measure first."""
    return cfg.top_entropy_share < 1 and not records_entropy(cfg)


def needs_every_row(cfg: Config) -> bool:
    """Whether entropies are measured in the rows with advantage 0, too."""
    return has_bonus(cfg) or scores_entropy(cfg)


def coefficient(cfg: Config, counters: Counters) -> float:
    """lambda of the next update."""
    value = cfg.entropy_coef if counters.entropy_coef is None else counters.entropy_coef
    if cfg.entropy_target is None:
        return value
    return value if counters.last_entropy is not None and counters.last_entropy <= cfg.entropy_target else 0.0


def adapt(cfg: Config, counters: Counters, entropy: float) -> None:
    """Move the coefficient after an update whose mean entropy over S, on all ranks, was `entropy`.

    >>> cfg, counters = Config(entropy_target=1.0, entropy_coef=0.01, entropy_coef_step=0.25), Counters()
    >>> for h in (0.5, 2.0, 3.0):
    ...     adapt(cfg, counters, h)
    ...     print(counters.entropy_coef, coefficient(cfg, counters))
    0.26 0.26
    0.010000000000000009 0.0
    0.0 0.0
    """
    assert cfg.entropy_target is not None
    value = cfg.entropy_coef if counters.entropy_coef is None else counters.entropy_coef
    value += cfg.entropy_coef_step if entropy <= cfg.entropy_target else -cfg.entropy_coef_step
    counters.entropy_coef, counters.last_entropy = min(max(value, 0.0), cfg.entropy_coef_max), entropy


def lowest_chosen(values: np.ndarray, share: float) -> float:
    """Threshold below the lowest of the values [n] that are at or above their linearly interpolated 1 - share quantile.

    First tokens of a group have one distribution, so equal entropies are common. The threshold is TIE below the value,
    so that all of them are chosen, or none, whatever the last bits of each micro-batch are.

    >>> [round(lowest_chosen(np.arange(n), 0.3), 4) for n in (1, 11, 12)]
    [-0.0, 7.0, 8.0]
    """
    place = math.ceil((1 - share) * (len(values) - 1) - 1e-6)
    return float(np.partition(values, place)[place]) - TIE


def threshold_of(values: np.ndarray, share: float) -> float:
    """`lowest_chosen`, or -inf, which chooses all, where there is no value or one is not finite: no update follows."""
    return lowest_chosen(values, share) if len(values) and np.isfinite(values).all() else -math.inf


def of_all_ranks(world: World, own: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """The values of each minibatch on all ranks. own: this rank's, minibatch after minibatch; counts: [W, minibatches].

    One gather.
    """
    padded = np.zeros(int(counts.sum(1).max()))
    padded[: len(own)] = own
    pieces = [np.split(row, np.cumsum(ends)) for row, ends in zip(world.gather_rows(padded), counts, strict=True)]
    return [np.concatenate([piece[i] for piece in pieces]) for i in range(counts.shape[1])]


def choose_recorded(
    world: World, cfg: Config, minibatches: Sequence[Sequence[int]], completions: Sequence[Completion], table: Table
) -> dict[int, np.ndarray] | None:
    """Row -> its tokens that have a surrogate, [C] bool, of this rank's completions, by the recorded entropies.

    minibatches: the rows of each. None: all tokens have one, or `EntropyTerms` chooses them. One gather.
    """
    if cfg.top_entropy_share == 1 or not records_entropy(cfg):
        return None
    entropies: dict[int, np.ndarray] = {}
    own = {completion.row: completion for completion in completions}
    for row, completion in own.items():
        assert completion.entropy is not None, "the engine recorded no entropies"
        entropies[row] = completion.entropy.astype(np.float64)
    # the sizes of what comes from each rank follow from the table
    places = [np.array(rows, np.int64) for rows in minibatches]
    sizes = [np.bincount(table.sampled_by[rows], table.num_trained[rows], world.size) for rows in places]
    mine = [entropies[n][own[n].trained] for rows in minibatches for n in rows if n in own]
    gathered = of_all_ranks(
        world, np.concatenate([np.zeros(0), *mine]), np.array(sizes, np.int64).reshape(-1, world.size).T
    )
    chosen: dict[int, np.ndarray] = {}
    for rows, values in zip(minibatches, gathered, strict=True):
        threshold = threshold_of(values, cfg.top_entropy_share)
        chosen |= {n: own[n].trained & ~(entropies[n] < threshold) for n in rows if n in own}
    return chosen


def acts_on(micro: MicroBatch) -> Tensor:
    """S within a micro-batch, [B, T] bool."""
    return micro.trained if micro.chosen is None else micro.chosen


class EntropyTerms:
    """Measures entropies where a setting needs them; without one every method returns at once."""

    def __init__(self, cfg: Config, world: World, scorer: Scorer):
        self.cfg = cfg
        self.world = world
        self.scorer = scorer
        self.scores, self.has_bonus = scores_entropy(cfg), has_bonus(cfg)
        self.before: tuple[float, int] | None = None  # sum of entropies and tokens, of this rank before the updates
        self.parts: list[Tensor] = []  # [] each, of this update's micro-batches: sum over S of H / |S|
        self.observe: Callable[[MicroBatch, Tensor, Tensor | None], None] = lambda micro, logprobs, entropy: None

    def score(self, micro: MicroBatch, backend: Backend) -> Tensor:
        """Log-probs [B, T] for an update. With a bonus the forward also measures the entropies that `add` reads."""
        self.scorer.measures_entropy = self.has_bonus
        try:
            logprobs = backend.score(micro)
        finally:
            self.scorer.measures_entropy = False
        self.observe(micro, logprobs, self.scorer.entropy if self.has_bonus else micro.entropy)
        return logprobs

    def before_updates(self, micro: MicroBatch, backend: Backend) -> MicroBatch:
        """Add entropies to choose tokens by, where none are recorded, and old log-probs of the same forward."""
        if not self.scores:
            return micro
        self.scorer.measures_entropy = True
        try:
            logprobs = backend.score(micro)
        finally:
            self.scorer.measures_entropy = False
        old = logprobs if updates_per_step(self.cfg) > 1 else None
        return dataclasses.replace(micro, entropy=self._taken(), old_logprobs=old)

    def _taken(self) -> Tensor:
        """The entropies of the last forward, [B, T]; the scorer keeps no reference to them."""
        entropy, self.scorer.entropy = self.scorer.entropy, None
        assert entropy is not None
        return entropy

    def weighted(self, batches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Choose tokens where it is not done, and divide the bonus by their number. One gather, or two."""
        if not (self.scores or self.has_bonus):
            return batches
        # tokens of each minibatch on each rank
        own_counts = [sum(int(acts_on(micro).sum()) for micro in minibatch) for minibatch in batches]
        counts = self.world.gather_rows(np.array(own_counts, np.float64)).astype(int)  # [W, minibatches]
        sizes = counts.sum(0).tolist()  # |S| of each minibatch
        thresholds = [-math.inf] * len(batches)
        if self.scores:
            for i, values in enumerate(of_all_ranks(self.world, self._measured(batches), counts)):
                thresholds[i] = threshold_of(values, self.cfg.top_entropy_share)
                sizes[i] = np.count_nonzero(~(values < thresholds[i]))
        return [
            [self._marked(micro, threshold, max(1, size)) for micro in minibatch]
            for minibatch, threshold, size in zip(batches, thresholds, sizes, strict=True)
        ]

    def _measured(self, batches: list[list[MicroBatch]]) -> np.ndarray:
        """The entropies of this rank's trained tokens, minibatch after minibatch."""
        parts = [
            micro.entropy[micro.trained] for minibatch in batches for micro in minibatch if micro.entropy is not None
        ]
        values: np.ndarray = torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)
        self.before = (float(values.sum()), len(values))
        return values

    def _marked(self, micro: MicroBatch, threshold: float, size: int) -> MicroBatch:
        """The micro-batch with its chosen tokens and the weights of the bonus. size: |S|."""
        if self.scores:
            assert micro.entropy is not None
            micro = dataclasses.replace(micro, chosen=micro.trained & ~(micro.entropy.double() < threshold))
        return dataclasses.replace(micro, entropy_weights=acts_on(micro).float() / size if self.has_bonus else None)

    def add(self, token_loss: Tensor, micro: MicroBatch, means: dict[str, Tensor], counters: Counters) -> Tensor:
        """token_loss [B, T], weighted, minus the bonus on the micro-batch that was scored last; also its metrics."""
        if micro.chosen is not None:
            means["entropy/chosen"] = micro.chosen
        if not self.has_bonus:
            return token_loss
        assert micro.entropy_weights is not None
        entropy = self._taken()
        means["entropy/true"] = entropy.detach()
        self.parts.append((entropy.detach() * micro.entropy_weights).sum())
        value = coefficient(self.cfg, counters)
        return token_loss - value * entropy * micro.entropy_weights if value else token_loss

    def after_update(self, counters: Counters, tally: Tally) -> None:
        """Record what was measured, and adapt the coefficient, after an update that was not skipped."""
        if self.before is not None and not self.has_bonus:
            tally.mean("entropy/true", *self.before)
        self.before = None
        if self.has_bonus:
            tally.mean("entropy/coef", coefficient(self.cfg, counters), 1.0)
        if self.cfg.entropy_target is None:
            return
        part = float(torch.stack(self.parts).sum(dtype=torch.float64)) if self.parts else 0.0
        part = round(part * FIXED_POINT) if math.isfinite(part) else math.nan
        entropy = float(self.world.sum_rows(np.array([part], np.float64))[0]) / FIXED_POINT
        if math.isfinite(entropy):
            adapt(self.cfg, counters, max(0.0, entropy))  # of a certain choice it may be rounded below 0
