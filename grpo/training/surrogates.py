"""Surrogates beside ppo_clip, which losses.py has: the loss of a token before any weight.

    r_t     ratio of policy to old policy, per token or for the whole sequence (`log_ratio` in losses.py)
    cispo      -min(sg(r_t), 1 + clip_eps_high) A log p_t     CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5
    sapo       -4 / tau  sigmoid(tau (r_t - 1)) A             SAPO, arXiv 2511.20347; tau by the sign of A
    gmpo       -A exp(mean over t of clip(log r_t))             GMPO, arXiv 2507.20673; the clip by the sign of A
    reinforce  -A log p_t                                     REINFORCE, without ratio and clip

sg: no gradient. CISPO's paper also clips the weight below, and then sets that bound to have no effect; here there is
none. TRL's `epsilon_high` bounds the weight of cispo itself, ours is 1 + clip_eps_high, as in the paper.
"""

import torch
from torch import Tensor

from grpo.config.settings import Config
from grpo.training.losses import LossInputs, Surrogate, ppo_clip, ratio_of


def cispo(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """A clipped weight without gradient on the log-prob, so that no token loses its gradient.

    >>> new, old = torch.tensor([[-0.5]]), torch.tensor([[-1.5]])  # the ratio is e
    >>> one = LossInputs(new, old, None, old, advantages=torch.ones(1), trained=new < 0)
    >>> loss, metrics = cispo(one, Config(surrogate="cispo", clip_eps_high=1.0))
    >>> loss.tolist(), metrics["clip/high"].tolist()
    ([[1.0]], [[True]])
    """
    high = 1 + (cfg.clip_eps if cfg.clip_eps_high is None else cfg.clip_eps_high)
    ratio, gain = ratio_of(inputs, cfg).detach(), inputs.advantages[:, None]
    loss = -ratio.clamp(max=high) * gain * _logprobs(inputs)
    return loss, {"clip/high": (ratio > high) & (gain > 0)}


def sapo(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """A smooth gate in place of the clip: its gradient falls off on both sides of ratio 1.

    >>> same = torch.tensor([[-0.5]])
    >>> sapo(LossInputs(same, same, None, same, advantages=torch.ones(1), trained=same < 0), Config())[0].tolist()
    [[-2.0]]
    """
    gain = inputs.advantages[:, None]
    tau = torch.where(gain > 0, cfg.sapo_temperature, cfg.sapo_temperature_negative)
    return -(tau * (ratio_of(inputs, cfg) - 1)).sigmoid() * 4 / tau * gain, {}


def gmpo(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The geometric mean of the row's ratios, each clipped as ppo_clip does, in log space.

    >>> new, old = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-1.5, -1.0]])  # log-ratios 1 and 0
    >>> one = LossInputs(new, old, None, old, advantages=torch.ones(1), trained=new < 0)
    >>> gmpo(one, Config(surrogate="gmpo", clip_eps=0.4))[0]
    tensor([[-1.2214, -1.2214]])
    """
    high = cfg.clip_eps if cfg.clip_eps_high is None else cfg.clip_eps_high
    gain = inputs.advantages[:, None]
    gap = torch.where(inputs.trained, inputs.logprobs - inputs.old_logprobs, 0.0)
    kept = torch.where(gain > 0, gap.clamp(max=high), gap.clamp(min=-cfg.clip_eps))
    mean = kept.sum(-1, keepdim=True) / inputs.trained.sum(-1, keepdim=True).clamp(min=1)
    clipped = {"clip/low": (gap < -cfg.clip_eps) & (gain < 0), "clip/high": (gap > high) & (gain > 0)}
    return -(mean.exp() * gain).expand_as(gap), clipped


def reinforce(inputs: LossInputs, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain policy gradient."""
    return -inputs.advantages[:, None] * _logprobs(inputs), {}


def _logprobs(inputs: LossInputs) -> Tensor:
    return torch.where(inputs.trained, inputs.logprobs, 0.0)


SURROGATES: dict[str, Surrogate] = {
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "reinforce": reinforce,
}
