"""The setting `surrogate`: a name of the table in surrogates.py, or a function of the user's own.

    def my_surrogate(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, mask):
        ...
        return token_loss, {"my_metric": values}  # [B, T] each, unweighted; values outside `mask` are ignored

It is called with keyword arguments, tensors [B, T] (advantages [B]; ref_logprobs None without KL), in the trainer's
process. Weighting, KL term and importance weight are applied to its result, as to that of every surrogate (losses.py).
"""

import functools
import re
from typing import Any

import torch
from torch import Tensor

from grpo.config.algorithm import check_function
from grpo.config.settings import Config, kl_in_loss
from grpo.training.losses import LossInputs, Surrogate
from grpo.training.metrics import declare
from grpo.training.surrogates import SURROGATES
from grpo.training.user_functions import UserFunction, load_user_function

METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)*")


def load_surrogate(cfg: Config) -> tuple[Surrogate, str]:
    """The surrogate, checked on a tiny batch, and the source text of a user's own file, else "". Raises UserError."""
    check_function("surrogate", cfg.surrogate)
    if cfg.surrogate in SURROGATES:
        return SURROGATES[cfg.surrogate], ""
    return _load(cfg.surrogate, kl_in_loss(cfg))


@functools.cache
def _load(setting: str, with_reference: bool) -> tuple[Surrogate, str]:
    function = load_user_function("surrogate", setting)

    def own(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = function.function(**_arguments(inputs))  # an error of memory must stay one
        return loss, {f"surrogate/{name}": values for name, values in metrics.items()}

    declare(means=[f"surrogate/{name}" for name in _check(function, with_reference)])
    return own, function.source


def _arguments(inputs: LossInputs) -> dict[str, Tensor | None]:
    return dict(
        logprobs=inputs.logprobs,
        old_logprobs=inputs.old_logprobs,
        ref_logprobs=inputs.ref_logprobs,
        sampler_logprobs=inputs.sampler_logprobs,
        advantages=inputs.advantages,
        mask=inputs.trained,
    )


def _check(function: UserFunction, with_reference: bool) -> list[str]:
    """Call it once on 2 rows of 3 tokens. Returns the names of its metrics. Raises UserError when it cannot train."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, -3.0]], requires_grad=True)
    old = torch.tensor([[-1.1, -1.9, -0.5], [-0.4, -1.5, -2.8]])
    trained = torch.tensor([[True, True, False], [True, True, True]])
    inputs = LossInputs(logprobs, old, old - 0.1 if with_reference else None, old, torch.tensor([1.0, -0.5]), trained)
    returned = function.call(**_arguments(inputs))
    problem = _problem(returned, inputs)
    if problem:
        raise function.wrong(problem)
    return list(returned[1])


def _problem(returned: Any, inputs: LossInputs) -> str:
    """What is wrong with the values that a surrogate returned; "" if they are right."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        return "must return a tuple (loss of each token, dictionary of metrics)."
    loss, metrics = returned
    shape = tuple(inputs.logprobs.shape)
    if not isinstance(loss, Tensor) or tuple(loss.shape) != shape or not loss.is_floating_point():
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        return f"must return a loss for each token, floats of shape {list(shape)}, got {found}."
    if not bool(torch.isfinite(loss[inputs.trained]).all()):
        return "returned a loss that is not finite on ordinary log-probs."
    for name, values in metrics.items():
        if not isinstance(name, str) or not METRIC_NAME.fullmatch(name):
            return f"must name its metrics in lower-case letters, digits, _ and /, got {str(name)[:60]!r}."
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            return f"must return its metric {name} as a tensor of shape {list(shape)}."
    if not loss.requires_grad:
        return "returned a loss without gradient: it must depend on logprobs."
    [gradient] = torch.autograd.grad(loss[inputs.trained].sum(), inputs.logprobs, allow_unused=True)
    if gradient is None or not bool(gradient[inputs.trained].any()):
        return "returned a loss whose gradient does not reach logprobs."
    if not bool(torch.isfinite(gradient).all()):
        return "has a gradient that is not finite on ordinary log-probs."
    return ""
