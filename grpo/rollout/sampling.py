"""One token from one row of logits: the distribution, and the draw.

    p = softmax(clamp(logits) / temperature), restricted to the support and renormalised
    token = the first, in vocabulary order, whose cumulative probability exceeds the uniform

The cumulative sum is in float64, in vocabulary order. The support, the ids that top_k, top_p and min_p keep, is part of
the distribution: it is stored with the token, and training renormalises over the same ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.config.settings import Config
from grpo.forward.logprobs import bounded_logits
from grpo.forward.precision import host_reads_are_free

BLOCK = 512  # vocabulary entries of one block of the cumulative sum
NOTHING = -1e30  # logit of what is not in the support: its weight is 0, and so is their product


@dataclass(frozen=True)
class Sampling:
    """The sampling distribution. temperature 0 is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_support: int = 128
    logit_clamp: float = 100.0
    records_entropy: bool = False  # whether a draw has the entropy of its distribution

    @property
    def truncates(self) -> bool:
        """Whether a support is stored with each token."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def support_width(self) -> int:
        """K, ids stored for each token; 0 without truncation."""
        return min(self.top_k or self.max_support, self.max_support) if self.truncates else 0


def records_entropy(cfg: Config) -> bool:
    """Whether the engine records the entropy of each token, so that no forward has to measure it."""
    return cfg.top_entropy_share < 1 and cfg.rollout_engine == "native"


def sampling_of(cfg: Config) -> Sampling:
    """The sampling distribution of training."""
    truncation = (cfg.top_p, cfg.top_k, cfg.min_p, cfg.max_support)
    return Sampling(cfg.temperature, *truncation, cfg.logit_clamp, records_entropy(cfg))


@dataclass(frozen=True)
class Draw:
    """One token for each of B rows."""

    token_ids: Tensor  # [B] int64
    logprobs: Tensor  # [B] float32
    finite: Tensor  # [B] bool; False: the row's logits were not finite, and its token is arbitrary
    clamped: Tensor | None  # [B] int64, logits that the clamp changed; None: no row had any
    support: Tensor | None = None  # [B, K] int64, ascending, -1 padded
    entropy: Tensor | None = None  # [B] float32, nats; None: not recorded


def kept_support(probs: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] -> [B, K] ids kept by top_k, top_p and min_p, ascending, -1 padded.

    top_p keeps the likeliest tokens until their sum reaches it, the token that crosses it included. At least the
    likeliest token is kept, at most max_support tokens.

    >>> kept_support(torch.tensor([[0.1, 0.6, 0.3]]), Sampling(top_p=0.8, max_support=3)).tolist()
    [[1, 2, -1]]
    """
    top, ids = probs.topk(min(sampling.support_width, probs.shape[-1]), dim=-1)  # descending
    before = top.cumsum(-1) - top
    keep = (before < sampling.top_p) & (top >= sampling.min_p * top[:, :1])
    keep[:, 0] = True
    vocab = probs.shape[-1]
    ordered = ids.masked_fill(~keep, vocab).sort(dim=-1).values
    padding = sampling.support_width - ordered.shape[-1]  # a vocabulary smaller than max_support
    return nn.functional.pad(ordered.masked_fill(ordered == vocab, -1), (0, padding), value=-1)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Draw:
    """Draw one token per row from logits [B, V] with uniforms [B] in [0, 1), float64."""
    logits = logits.float()
    # on CPU one read finds that no row is non-finite or needs the clamp; elsewhere both are always handled
    low, high = torch.aminmax(logits, dim=-1)  # NaN where any logit is NaN
    finite, clamped = high - low <= 2 * sampling.logit_clamp, None
    if not host_reads_are_free(logits.device) or not bool(finite.all()):
        finite = torch.isfinite(low) & torch.isfinite(high)
        logits = torch.where(finite[:, None], logits, torch.zeros((), device=logits.device))
        logits, clamped = bounded_logits(logits, 1.0, sampling.logit_clamp)
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    # greedy, whole vocabulary, or a support
    if sampling.temperature == 0:
        token_ids = logits.argmax(-1)
        logprobs = logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)
        return Draw(token_ids, logprobs, finite, clamped)
    if not sampling.truncates:
        picks, logprobs, entropy = _pick(logits, uniforms, sampling.records_entropy)
        return Draw(picks, logprobs, finite, clamped, None, entropy)
    support = kept_support(torch.softmax(logits, dim=-1), sampling)
    inside = logits.gather(-1, support.clamp(min=0)).masked_fill(support < 0, NOTHING)  # [B, K]
    picks, logprobs, entropy = _pick(inside, uniforms, sampling.records_entropy)
    return Draw(support.gather(-1, picks[:, None])[:, 0], logprobs, finite, clamped, support, entropy)


def _pick(logits: Tensor, uniforms: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse CDF: logits [B, V], uniforms [B] -> token [B], its log-prob [B], the entropy [B] where asked for.

    A long cumulative sum is computed over blocks and then within one block, so that only one block is in float64. A
    uniform is at most 1 - 2^-53, so its product with the total is below the total and some entry exceeds it.
    """
    high, moment = logits.amax(-1, keepdim=True), None
    weights = (below := logits - high).exp() if with_entropy else (logits - high).exp_()
    if with_entropy:  # below: b = z - max z; H = log sum e^b - sum(b e^b) / sum e^b
        moment = below.mul_(weights).sum(-1, dtype=torch.float64, keepdim=True)
    if weights.shape[-1] <= BLOCK:
        inside = weights.cumsum(-1, dtype=torch.float64)
        total = inside[:, -1:]
        token_ids = torch.searchsorted(inside, uniforms[:, None] * total, right=True)[:, 0]
    else:
        padding = -weights.shape[-1] % BLOCK
        if padding:
            weights = nn.functional.pad(weights, (0, padding))
        # the block, then the place within it
        blocks = weights.view(len(weights), -1, BLOCK)
        sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, V / BLOCK]
        total = sums[:, -1:]
        threshold = uniforms[:, None] * total
        block = torch.searchsorted(sums, threshold, right=True)  # [B, 1]
        before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
        inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
        token_ids = block[:, 0] * BLOCK + _first_beyond(inside, threshold - before)[:, 0]
    chosen = logits.gather(-1, token_ids[:, None]) - high
    entropy = None if moment is None else (total.log() - moment / total).float()[:, 0]
    return token_ids, (chosen - total.log().float())[:, 0], entropy


def _first_beyond(sums: Tensor, threshold: Tensor) -> Tensor:
    """First column whose cumulative sum exceeds the threshold, [B, V], [B, 1] -> [B, 1].

    Where rounding puts the threshold at the end of the sum, it is the last column with a weight above 0.
    """
    picks = torch.searchsorted(sums, threshold, right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())  # the first that equals the end
    return torch.minimum(picks, last)
