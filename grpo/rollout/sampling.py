"""One token from one row of logits: the distribution, and the draw.

    p = softmax(clamp(logits) / temperature), restricted to the kept support and renormalised
    token = the first, in vocabulary order, whose cumulative probability exceeds the uniform

The cumulative sum is in float64. The support (what top_k, top_p and min_p kept) is part of the
distribution: it is stored with the token, and training renormalises over the same ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.config import Config
from grpo.logprobs import bounded_logits


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 means greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_support: int = 128
    logit_clamp: float = 100.0

    @property
    def truncates(self) -> bool:
        """Whether a support is kept and stored."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def support_width(self) -> int:
        """K, ids stored for each token; 0 without truncation."""
        return min(self.top_k or self.max_support, self.max_support) if self.truncates else 0


def sampling_of(cfg: Config) -> Sampling:
    """The training distribution."""
    return Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p, cfg.max_support, cfg.logit_clamp)


@dataclass(frozen=True)
class Draw:
    """One token for each of B rows."""

    token_ids: Tensor  # [B] int64
    logprobs: Tensor  # [B] float32
    finite: Tensor  # [B] bool; False: the row's logits were not finite, its token means nothing
    clamped: Tensor  # [B] int64, logits that the clamp moved
    support: Tensor | None = None  # [B, K] int64, ascending, -1 padded


def kept_support(probs: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] -> [B, K] ids kept by top_k, top_p and min_p, ascending, -1 padded.

    top_p keeps the likeliest tokens until their sum reaches it, the one that crosses included; at least
    the likeliest is kept, at most max_support.

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
    finite = torch.isfinite(logits).all(-1)
    if not bool(finite.all()):
        logits = torch.where(finite[:, None], logits, torch.zeros((), device=logits.device))
    bounded, clamped = bounded_logits(logits, sampling.temperature or 1.0, sampling.logit_clamp)
    logprobs = torch.log_softmax(bounded, dim=-1)
    if sampling.temperature == 0:
        token_ids = bounded.argmax(-1)
        return Draw(token_ids, logprobs.gather(-1, token_ids[:, None])[:, 0], finite, clamped)
    if not sampling.truncates:
        picks = _inverse_cdf(logprobs.double().exp(), uniforms)
        return Draw(picks, logprobs.gather(-1, picks[:, None])[:, 0], finite, clamped)
    support = kept_support(logprobs.exp(), sampling)
    kept = support >= 0
    inside = bounded.gather(-1, support.clamp(min=0)).masked_fill(~kept, -torch.inf)
    logprobs = torch.log_softmax(inside, dim=-1)  # [B, K]
    picks = _inverse_cdf(logprobs.double().exp(), uniforms)
    return Draw(
        support.gather(-1, picks[:, None])[:, 0], logprobs.gather(-1, picks[:, None])[:, 0], finite, clamped, support
    )


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """First column whose cumulative probability exceeds the uniform: [B, V] float64, [B] -> [B]."""
    cdf = probs.cumsum(-1)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    picks = torch.searchsorted(cdf, threshold, right=True)[:, 0]
    # Rounding can put the threshold on the very end of the sum: the last token with any probability.
    last = (probs > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(picks, last)
