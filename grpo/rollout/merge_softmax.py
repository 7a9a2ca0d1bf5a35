"""Attention over keys that are stored in several places: each place alone, then merged to one softmax.

    a, b: largest score of each place, m of both;  A, B: weighted sums of values;  sum A, sum B: of weights
    (e^(a-m) A + e^(b-m) B) / (e^(a-m) sum A + e^(b-m) sum B)

Dao et al., FlashAttention (arXiv 2205.14135), section 3.1, does this over blocks of keys. The simple path is one
softmax over all keys; the doctest of `merged` compares them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]
"""Largest score and sum of exponentials, both [..., q, 1], and weighted sum of values [..., q, d]; all fp32."""


def part_of(scores: Tensor, values: Tensor) -> Part:
    """scores [..., q, k], values [..., k, d] of one place. Overwrites the scores if they are fp32."""
    scores = scores.float()
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), (weights.to(values.dtype) @ values).float()


def merged(parts: Sequence[Part]) -> Tensor:
    """What one softmax over all keys would give, [..., q, d] fp32.

    >>> scores, values = torch.randn(2, 3, 7), torch.randn(2, 7, 4)
    >>> two = [part_of(scores[..., at].clone(), values[:, at]) for at in (slice(0, 5), slice(5, 7))]
    >>> torch.allclose(merged(two), scores.softmax(-1) @ values, atol=1e-6)
    True
    """
    top, total, out = parts[0]
    for part_top, part_total, part_out in parts[1:]:
        new_top = torch.maximum(top, part_top)
        # factors that bring both parts to the common maximum
        a, b = (top - new_top).exp_(), (part_top - new_top).exp_()
        top, total, out = new_top, total * a + part_total * b, out * a + part_out * b
    return out / total
