"""Importance weights of tokens whose sampler's log-probs are not the trainer's: the setting `sampler_correction`.

token_truncate     min(u_t, m)             u_t = exp(old_t - sampler_t), m = max_importance_weight
token_mask         u_t within 1 / m to m, else 0                                                   IcePop
sequence_*         the same of the product of u over the row's trained tokens

The setting `off_policy_threshold` d leaves rows out of the surrogate instead of weighting them: those with A_n < 0 and

    mean over the row's trained tokens of (sampler_t - logp_t) > d            DeepSeek-V3.2, arXiv 2512.02556, eq. 9

logp is the policy at this update, without gradient. The rows stay in the denominators, and keep their KL.

How far the two are apart is measured on u before any limit, over the trained tokens of all ranks:

    effective sample size, as a share of the tokens = (mean u)^2 / mean u^2       Kong 1992; 1 where all u are equal
"""

import itertools
import math

import torch
from torch import Tensor

from grpo.config.settings import Config
from grpo.errors import Lost
from grpo.training.metrics import declare

LOG_RATIO_CLAMP = 20.0
GAPS = (0.0, 0.001, 0.01, 0.1, 1.0, math.inf)  # in nats: edges of the histogram of |log u|
BINS = (*(f"sampler/gap_below_{edge:g}" for edge in GAPS[1:-1]), f"sampler/gap_above_{GAPS[-2]:g}")
U, U_SQUARED, ESS = "sampler/u", "sampler/u2", "sampler/ess"

declare(means=("clip/off_policy", "clip/importance", U, U_SQUARED, *BINS))


def correction(log_weight: Tensor, cfg: Config) -> Tensor:
    """Importance weight [B, T] of tokens whose sampler's log-probs are `log_weight` below the old ones.

    >>> log_weights, ways = torch.tensor([[3.0, 0.25]]).log(), ("token_truncate", "token_mask", "sequence_mask", "none")
    >>> [correction(log_weights, Config(sampler_correction=way)).tolist()[0] for way in ways]
    [[2.0, 0.25], [0.0, 0.0], [0.75, 0.75], [1.0, 1.0]]
    """
    if cfg.sampler_correction == "none":
        return torch.ones_like(log_weight)
    if cfg.sampler_correction.startswith("sequence"):
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(log_weight)
    weight, limit = log_weight.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp(), cfg.max_importance_weight
    if cfg.sampler_correction.endswith("truncate"):
        return weight.clamp(max=limit)
    return torch.where((weight <= limit) & (weight * limit >= 1), weight, 0.0)


def off_policy(log_weight: Tensor, advantages: Tensor, trained: Tensor, threshold: float) -> Tensor:
    """[B, T] bool: tokens of rows without surrogate loss. log_weight: [B, T] policy - sampler log-prob; advantages [B].

    >>> gaps, trained = torch.tensor([[-0.5, -0.1, 9.0], [-0.5, -0.1, 9.0]]), torch.tensor([[True, True, False]] * 2)
    >>> [off_policy(gaps, torch.tensor([-1.0, 1.0]), trained, d)[:, 0].tolist() for d in (0.25, 0.35)]
    [[True, False], [False, False]]
    """
    apart = torch.where(trained, -log_weight.detach(), 0.0).sum(-1) / trained.sum(-1).clamp(min=1)
    return ((advantages < 0) & (apart > threshold))[:, None].expand_as(log_weight)


def mismatch(log_weight: Tensor) -> dict[str, Tensor]:
    """Means of the importance weight u before any limit, and shares of tokens by |log u|. log_weight: [B, T] log u.

    >>> found = mismatch(torch.tensor([[0.5, -0.02, 0.0]]))
    >>> [found[name].tolist()[0].index(True) for name in ("sampler/gap_below_0.001", "sampler/gap_below_1")]
    [2, 0]
    """
    weight, gap = log_weight.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp(), log_weight.abs()
    shares = [(gap >= low) & (gap < high) for low, high in itertools.pairwise(GAPS)]
    return {U: weight, U_SQUARED: weight.square(), **dict(zip(BINS, shares, strict=True))}


def with_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """A step's metrics over all ranks, with the effective sample size where its two means were measured.

    >>> with_sample_size({"sampler/u": 0.5, "sampler/u2": 0.5})["sampler/ess"], with_sample_size({"lr": 1.0})
    (0.5, {'lr': 1.0})
    """
    return metrics if U not in metrics else {**metrics, ESS: metrics[U] ** 2 / metrics[U_SQUARED]}


def check_gap(metrics: dict[str, float], limit: float) -> None:
    """End a run whose rollout server computes something else. limit: of the mean gap, in nats. Raises Lost.

    >>> check_gap({"sampler_gap/mean": 3.0}, 0.02)
    Traceback (most recent call last):
    grpo.errors.Lost: max_sampler_gap: log-probs of the rollout server are 3 nats from ...
    """
    gap = metrics.get("sampler_gap/mean", 0.0)
    if not gap <= limit:
        raise Lost(
            f"max_sampler_gap: log-probs of the rollout server are {gap:.3g} nats from the trainer's on average, "
            f"{limit:g} are allowed. This step is not saved. Compare the server's flags (--dtype, quantisation, rope) "
            "with this run, or set max_sampler_gap."
        )
