"""The entropy of the distribution that a token is drawn from, on the simple path: through autograd.

    H = -sum_v p_v log p_v,  p = softmax(z)        z: bounded logits, over the support where sampling is truncated
    dH/dz_v = -p_v (log p_v + H)

The fused head (fused_head.py) computes both without autograd; tests compare the two.
"""

from torch import Tensor


def entropy_of(logits: Tensor) -> Tensor:
    """logits [M, V], -inf outside the support -> entropies [M] in nats, with gradient.

    >>> import torch
    >>> entropy_of(torch.tensor([[0.0, 0.0, -torch.inf]])).tolist()
    [0.6931471824645996]
    """
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1)
