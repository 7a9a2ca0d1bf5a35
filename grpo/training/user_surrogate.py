"""The setting `surrogate`: a name of the table in surrogates.py, or a function of the user's own.

    def my_surrogate(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, mask):
        ...
        return token_loss, {"my_metric": values}  # [B, T] each, unweighted; values outside `mask` are ignored

It is called with keyword arguments, tensors [B, T] (advantages [B]; ref_logprobs None without KL), in the trainer's
process. Weighting, KL term and importance weight are applied to its result, as to that of every surrogate (losses.py).
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo.config.names import find_path
from grpo.config.settings import Config, kl_in_loss
from grpo.errors import UserError
from grpo.rewards.functions import load_module
from grpo.training.losses import LossInputs, Surrogate
from grpo.training.metrics import declare
from grpo.training.surrogates import SURROGATES

METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)*")


def load_surrogate(cfg: Config) -> tuple[Surrogate, str]:
    """The surrogate, checked on a tiny batch, and the source text of a user's own file, else "". Raises UserError."""
    return _load(cfg.surrogate, kl_in_loss(cfg))


@functools.cache  # a file is read once in a run, even if it changes later
def _load(setting: str, with_reference: bool) -> tuple[Surrogate, str]:
    file, _, name = setting.rpartition(":")
    if not file:
        if name not in SURROGATES:
            raise UserError(
                f"surrogate: must be one of {', '.join(SURROGATES)}, or path/to/file.py:function, got {name[:60]!r}."
            )
        return SURROGATES[name], ""
    path = find_path(file)
    if path is None or not path.is_file() or path.suffix != ".py":
        raise UserError(f"surrogate: no such Python file {file[:200]!r}. Write path/to/file.py:function.")
    try:
        text = importlib.util.decode_source(path.read_bytes())
        function = getattr(load_module(f"surrogate_from_{path.stem}", str(path), text), name, None)
    except Exception as error:
        raise UserError(f"surrogate: {file} cannot be imported: {type(error).__name__}: {error}.") from None
    if not callable(function):
        raise UserError(f"surrogate: {file} has no function {name[:60]!r}. Write path/to/file.py:function.")

    def call(inputs: LossInputs) -> Any:
        return function(
            logprobs=inputs.logprobs,
            old_logprobs=inputs.old_logprobs,
            ref_logprobs=inputs.ref_logprobs,
            sampler_logprobs=inputs.sampler_logprobs,
            advantages=inputs.advantages,
            mask=inputs.trained,
        )

    def own(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = call(inputs)
        return loss, {f"surrogate/{name}": values for name, values in metrics.items()}

    declare(means=[f"surrogate/{name}" for name in _check(call, setting, with_reference)])
    return own, text


def _check(call: Callable[[LossInputs], Any], setting: str, with_reference: bool) -> list[str]:
    """Call it once on 2 rows of 3 tokens. Returns the names of its metrics. Raises UserError when it cannot train."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, -3.0]], requires_grad=True)
    old = torch.tensor([[-1.1, -1.9, -0.5], [-0.4, -1.5, -2.8]])
    trained = torch.tensor([[True, True, False], [True, True, True]])
    inputs = LossInputs(logprobs, old, old - 0.1 if with_reference else None, old, torch.tensor([1.0, -0.5]), trained)
    try:
        returned = call(inputs)
    except Exception as error:
        raise UserError(f"surrogate: {setting} raised {type(error).__name__}: {error}. Fix it.") from None
    problem = _problem(returned, inputs)
    if problem:
        raise UserError(f"surrogate: {setting} {problem} See docs/losses.md.")
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
