"""The objective: PPO's clip per token, k3 against the reference, one global denominator.

    ratio_t = exp(clamp(logp_t - old_t, ±20))
    loss_t  = -min(ratio_t * A, clip(ratio_t, 1 - eps_low, 1 + eps_high) * A) + beta * k3_t
    k3_t    = exp(ref_t - logp_t) - (ref_t - logp_t) - 1                 DeepSeekMath, arXiv 2402.03300, eq. 3 and 4
    loss    = sum over rows and tokens of weight * loss_t                weights below, already divided

Weights (N rows of the minibatch over all ranks, C_n tokens of row n, C_max = max_generate_length):

    grpo      1 / (N * C_n)      mean over rows of the row's mean         arXiv 2402.03300, eq. 3
    dapo      1 / sum C_n        mean over all tokens                     DAPO, arXiv 2503.14476, eq. 8
    dr_grpo   1 / (N * C_max)    sum over a constant length               Dr. GRPO, arXiv 2503.20783

The gradient contract: what `backward` gets is divided by the global denominator; backends *sum* over ranks.

Differs from the paper: the log-ratio is clamped before exp; a weight truncated at `max_importance_weight`
corrects a sampler whose log-probs are not the trainer's (arXiv 2503.14476 does without).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0


def ppo_clip(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Per-token clipped surrogate: log_ratio [B, T], advantages [B] -> [B, T].

    >>> ppo_clip(torch.tensor([[1.5, 0.5]]).log(), torch.tensor([1.0]), 0.2, 0.2).tolist()
    [[-1.2000000476837158, -0.5]]
    """
    ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    gain = advantages[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative (Schulman, "Approximating KL", k3)."""
    gap = (ref_logprobs - logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return gap.exp() - gap - 1


RowWeight = Callable[[int, Sequence[int], int], float]

ROW_WEIGHTS: dict[str, RowWeight] = {
    "grpo": lambda length, lengths, max_length: 1.0 / (len(lengths) * max(1, length)),
    "dapo": lambda length, lengths, max_length: 1.0 / max(1, sum(lengths)),
    "dr_grpo": lambda length, lengths, max_length: 1.0 / (len(lengths) * max_length),
}


def row_weights(loss: str, lengths: Sequence[int], max_length: int) -> list[float]:
    """Weight of each token of each row of a minibatch, from the lengths of all its rows, on all ranks.

    >>> row_weights("grpo", [1, 3], 8), row_weights("dapo", [1, 3], 8), row_weights("dr_grpo", [1, 3], 8)
    ([0.5, 0.16666666666666666], [0.25, 0.25], [0.0625, 0.0625])
    """
    return [ROW_WEIGHTS[loss](length, lengths, max_length) for length in lengths]
