"""Attention over keys that lie in several places: each place by itself, then merged by their sums.

    a, b: largest score of each place, m of both;  A, B: weighted sums of values;  sum A, sum B: of weights
    (e^(a-m) A + e^(b-m) B) / (e^(a-m) sum A + e^(b-m) sum B)

As in Dao et al., FlashAttention (arXiv 2205.14135), section 3.1, over blocks of keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]
"""Largest score and sum of exponentials, both [..., q, 1], and weighted sum of values [..., q, d]; all fp32."""


def part_of(scores: Tensor, values: Tensor) -> Part:
    """Of one place: scores [..., q, k], values [..., k, d]."""
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
    for top_here, total_here, out_here in parts[1:]:
        most = torch.maximum(top, top_here)
        a, b = (top - most).exp_(), (top_here - most).exp_()
        top, total, out = most, total * a + total_here * b, out * a + out_here * b
    return out / total
