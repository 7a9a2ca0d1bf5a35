"""Whether a `Head` (logprobs.py) gives the logits of its model."""

import warnings
from typing import TYPE_CHECKING

import torch

from grpo.forward.arguments import accepted, trial_ids
from grpo.forward.precision import arithmetic

if TYPE_CHECKING:
    from grpo.forward.logprobs import Head

MAX_DIFFERENCE = {True: 1e-4, False: 1e-2}  # relative; True: in fp32, where a scale or cap left out is found


@torch.no_grad()
def matches_the_model(head: "Head") -> bool:
    """Compare with the model's own logits on a few tokens; a model that differs gets a warning.

    It runs on every rank: a sharded model's forward is a collective.
    """
    exact = all(parameter.dtype == torch.float32 for parameter in head.model.parameters())  # a frozen base may be bf16
    with arithmetic("fp32" if exact else head.dtype, head.model.device):
        inputs = {
            "input_ids": trial_ids(8, head.vocab_size, head.model.device)[None],
            **accepted(head.model, {"use_cache": False}),
        }
        expected = head.model(**inputs).logits.float()
        if not bool(torch.isfinite(expected).all()):
            return True  # weights with NaN say nothing about the head; the update's checks report them
        try:
            found = head.logits(head.body()(**inputs).last_hidden_state).float()
            limit = MAX_DIFFERENCE[exact] * expected.abs().amax().clamp(min=1.0)
            matches = found.shape == expected.shape and bool((found - expected).abs().amax() <= limit)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever an architecture raises
            matches = False
    if not matches:
        warnings.warn(
            f"{type(head.model).__name__}: the head could not be applied in blocks, whole logits are used: "
            "more memory, same numbers.",
            stacklevel=2,
        )
    return matches
