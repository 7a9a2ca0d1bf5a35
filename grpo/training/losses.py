"""The loss of GRPO: a surrogate per token, k3 against the reference, one global denominator.

    loss    = sum over rows n and trained tokens t of  w_n * (s_nt * c_nt + beta * k3_nt + router_aux_loss_coef * a_nt)
    a_nt    load-balancing loss of a mixture of experts                  router_balance.py
    k3_t    = exp(ref_t - logp_t) - (ref_t - logp_t) - 1                 DeepSeekMath, arXiv 2402.03300, eq. 4
    c_t     = min(exp(old_t - sampler_t), max_importance_weight)         sampler_correction.py

`surrogate` chooses s, here or in surrogates.py, and `weighting` w; `kl_estimator` may put k2, or k3 times the ratio, in
k3's place (docs/algorithms.md). `ratio` chooses whether r_t is of the token or its row (GSPO, arXiv 2507.18071, eq. 7).
entropy.py has a bonus beside this, and the choice of tokens that have an s; by default there is neither.

    ppo_clip  -min(min(r_t, r_max) * A, clip(r_t, 1 - eps_low, 1 + eps_high) * A)          arXiv 2402.03300, eq. 3
              r_t = exp(clamp(logp_t - old_t, +-20)), r_max = clip_ratio_max               arXiv 1912.09729, eq. 5

Weightings, for N rows of the minibatch over all ranks, C_n trained tokens of row n, C_max = max_generate_length:

    grpo      1 / (N * C_n)      mean over rows of the row's mean         arXiv 2402.03300, eq. 3
    dapo      1 / sum C_n        mean over all tokens                     DAPO, arXiv 2503.14476, eq. 8
    dr_grpo   1 / (N * C_max)    sum over a constant length               Dr. GRPO, arXiv 2503.20783

The gradient contract: what `backward` gets is divided by the global denominator; backends *sum* over ranks.

Differs from the paper: the log-ratio is clamped before exp; c corrects a sampler whose log-probs are not the trainer's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.config.settings import Config
from grpo.training.metrics import declare
from grpo.training.sampler_correction import LOG_RATIO_CLAMP, correction, mismatch, off_policy

declare(
    means=("kl", "kl_old", "clip/low", "clip/high", "sampler_gap/mean"),
    maxima=("ratio_gap", "sampler_gap/max"),
)


@dataclass(frozen=True)
class LossInputs:
    """What a surrogate may depend on, for B rows of T tokens."""

    logprobs: Tensor  # [B, T] of the policy, with gradient
    old_logprobs: Tensor  # [B, T] of the policy before the step's first update
    ref_logprobs: Tensor | None  # [B, T] of the reference; None without KL
    sampler_logprobs: Tensor  # [B, T] as the engine sampled
    advantages: Tensor  # [B]
    trained: Tensor  # [B, T] bool, the tokens that carry loss; other log-probs may be anything, also NaN
    chosen: Tensor | None = None  # [B, T] bool, of these the tokens with a surrogate; None: all


@dataclass
class Measured:
    """Measurements of a micro-batch beside its loss."""

    means: dict[str, Tensor] = field(default_factory=dict)  # [B, T] each, averaged over trained tokens
    maxima: dict[str, Tensor] = field(default_factory=dict)  # [] each
    sampler_gap: Tensor | None = None  # [] largest |policy - sampler| log-prob where both held the same weights


Surrogate = Callable[[LossInputs, Config], tuple[Tensor, dict[str, Tensor]]]
"""-> unweighted loss of each token [B, T], and named metrics [B, T]. Values outside `trained` are ignored."""


def ratio_of(inputs: LossInputs, cfg: Config) -> Tensor:
    """Ratio of the policy to the old one, [B, T], of each token or of its row."""
    gap = torch.where(inputs.trained, inputs.logprobs - inputs.old_logprobs, 0.0)
    if cfg.ratio != "token":
        mean = gap.sum(-1, keepdim=True) / inputs.trained.sum(-1, keepdim=True).clamp(min=1)
        gap = mean.expand_as(gap) if cfg.ratio == "sequence" else mean.detach() + gap - gap.detach()
    return gap.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()


def ppo_clip(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with separate widths below and above.

    >>> ratios = torch.tensor([[1.5, 0.5]])
    >>> one = LossInputs(ratios.log(), torch.zeros(1, 2), None, torch.zeros(1, 2), torch.ones(1), ratios > 0)
    >>> loss, metrics = ppo_clip(one, Config(clip_eps=0.2))
    >>> loss.tolist(), metrics["clip/high"].tolist()
    ([[-1.2000000476837158, -0.5]], [[True, False]])
    """
    low, high = cfg.clip_eps, cfg.clip_eps if cfg.clip_eps_high is None else cfg.clip_eps_high
    ratio, gain = ratio_of(inputs, cfg), inputs.advantages[:, None]
    bounded = ratio if cfg.clip_ratio_max is None else ratio.clamp(max=cfg.clip_ratio_max)
    loss = -torch.minimum(bounded * gain, ratio.clamp(1 - low, 1 + high) * gain)
    ratio = ratio.detach()
    return loss, {"clip/low": (ratio < 1 - low) & (gain < 0), "clip/high": (ratio > 1 + high) & (gain > 0)}


RowWeight = Callable[[int, Sequence[int], int], float]

WEIGHTINGS: dict[str, RowWeight] = {
    "grpo": lambda trained, all_trained, max_length: 1.0 / (len(all_trained) * max(1, trained)),
    "dapo": lambda trained, all_trained, max_length: 1.0 / max(1, sum(all_trained)),
    "dr_grpo": lambda trained, all_trained, max_length: 1.0 / (len(all_trained) * max_length),
}


def row_weights(weighting: str, trained: Sequence[int], max_length: int) -> list[float]:
    """Weight of each token of each row of a minibatch, from the trained tokens of all its rows, on all ranks.

    >>> row_weights("grpo", [1, 3], 8), row_weights("dapo", [1, 3], 8), row_weights("dr_grpo", [1, 3], 8)
    ([0.5, 0.16666666666666666], [0.25, 0.25], [0.0625, 0.0625])
    """
    return [WEIGHTINGS[weighting](count, trained, max_length) for count in trained]


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative (Schulman, "Approximating KL", k3)."""
    gap = (ref_logprobs - logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return gap.exp() - gap - 1


def policy_loss(
    inputs: LossInputs,
    weights: Tensor,
    cfg: Config,
    surrogate: Surrogate = ppo_clip,
    trust_sampler: bool = False,
    weights_unchanged: bool = False,
) -> tuple[Tensor, Measured]:
    """Weighted loss of each token [B, T], 0 outside `trained`, and measurements. The sum of the loss goes to backward.

    weights: [B, T], already divided by the global denominator. trust_sampler: the old log-probs are the sampler's, so
    no importance weight is needed. weights_unchanged: sampler and trainer hold the same weights, so every gap between
    their log-probs is arithmetic (or, with rollout_ahead, the sampler's are the last step's).
    """
    trained, logprobs, old = inputs.trained, inputs.logprobs, inputs.old_logprobs
    measured = Measured()

    # per-token surrogate, where top_entropy_share is below 1 only of tokens of high entropy
    token_loss, measured.means = surrogate(inputs, cfg)
    if inputs.chosen is not None:
        token_loss = torch.where(inputs.chosen, token_loss, 0.0)

    # importance weight, where the sampler's distribution is not the trainer's
    log_weight = torch.where(trained, old - inputs.sampler_logprobs, 0.0)
    if not trust_sampler:
        importance = correction(log_weight, cfg)
        token_loss = token_loss * importance
    if cfg.off_policy_threshold is not None:
        off = off_policy(logprobs - inputs.sampler_logprobs, inputs.advantages, trained, cfg.off_policy_threshold)
        token_loss, measured.means["clip/off_policy"] = torch.where(off, 0.0, token_loss), off

    # KL against the reference
    if inputs.ref_logprobs is not None:
        reference = torch.where(trained, inputs.ref_logprobs, logprobs.detach())
        measured.means["kl"] = k3(logprobs, reference)
        kl = (reference - logprobs).square() / 2 if cfg.kl_estimator == "k2" else measured.means["kl"]
        if cfg.kl_estimator == "k3_weighted":
            kl = kl * ratio_of(inputs, cfg)
        token_loss = token_loss + cfg.beta * kl

    # mask before weights: values outside `trained` may be NaN
    token_loss = torch.where(trained, token_loss, 0.0) * weights

    # how far the policy has moved within the step: k3 of KL(old || policy)
    log_ratio = torch.where(trained, logprobs.detach() - old, 0.0)
    measured.means["kl_old"] = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp() - 1 - log_ratio

    # how far the sampler's log-probs are from the trainer's
    if weights_unchanged:
        gap = torch.where(trained, logprobs.detach() - inputs.sampler_logprobs, 0.0)
        measured.means["sampler_gap/mean"] = gap.abs()
        measured.sampler_gap = gap.abs().amax()
        measured.maxima["sampler_gap/max"] = measured.sampler_gap
        measured.maxima["ratio_gap"] = (gap.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp() - 1).abs().amax()
        if not trust_sampler:
            measured.means |= {"clip/importance": importance != log_weight.exp(), **mismatch(log_weight)}
    return token_loss, measured
