"""Weights that are bf16 numbers, as published ones are: forward passes in bf16 round small changes of them away.

An update changes fp32 weights; under `dtype: bf16` a forward pass sees them rounded to bf16. A weight w that is a bf16
number is seen changed only when it has moved by half the distance to the next one, 2^-8 to 2^-9 of |w|.
"""

import torch
from transformers import PreTrainedModel

SHARE = 0.9  # of the weights, from which on a model counts as one of bf16 numbers
STRIDE = 1009  # between elements that are looked at: a prime, so that no matrix gives its first columns alone


@torch.no_grad()
def rounded_away(model: PreTrainedModel) -> float | None:
    """The median of what a weight can move without being seen in bf16; None: the weights are no bf16 numbers.

    >>> model = torch.nn.Linear(8, 8)
    >>> rounded_away(model.requires_grad_(False)) is None
    True
    >>> with torch.no_grad(): _ = model.requires_grad_().weight.fill_(1.5)
    >>> rounded_away(model) == 2.0**-8
    True
    """
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2 and parameter.dtype == torch.float32:
            found.append(parameter.reshape(-1)[::STRIDE].cpu())
    if not found:
        return None
    weights = torch.cat(found)
    weights = weights[weights != 0]
    exact = (weights.view(torch.int32) & 0xFFFF) == 0
    if not float(exact.float().mean()) >= SHARE:  # NaN: nothing was left
        return None
    _, exponents = torch.frexp(weights)  # |w| = m 2^e with 1/2 <= m < 1: bf16 numbers there are 2^(e - 8) apart
    return float(torch.ldexp(torch.ones(()), exponents - 9).median())
