"""Whole weights on every rank: a single process, or data parallel over ranks.

Gradients are summed in flat buckets, each sent as soon as the last micro-batch's backward has filled it (`BucketSum`).
torch's DistributedDataParallel is not used: it averages where our contract sums, expects the forward to go through its
wrapper (ours calls body and head separately), and hangs when a rank has no micro-batch.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.settings import Config
from grpo.forward.logprobs import Scorer
from grpo.models.quantization import fill_moments, make_adamw, moments_of
from grpo.runtime.distributed import World
from grpo.training.backends import MOMENTS, Piece, ReadMoment
from grpo.training.backends.gradient_sums import BucketSum, FixedPointSum
from grpo.types import MicroBatch


def open_backend(cfg: Config, world: World, scorer: Scorer) -> "Ddp":
    """See grpo/training/backends/__init__.py."""
    return Ddp(scorer, cfg, world)


class Ddp:
    """AdamW on whole fp32 weights."""

    even_work = False

    def __init__(self, scorer: Scorer, cfg: Config, world: World):
        self.scorer = scorer
        self.world = world
        self.parameters = trainable(scorer)
        parameters = list(self.parameters.values())
        self.fixed = FixedPointSum(parameters) if cfg.deterministic else None
        self.buckets = BucketSum(parameters) if world.size > 1 and not cfg.deterministic else None
        groups = decay_groups(self.parameters, cfg.weight_decay)
        self.in_8bit = cfg.optimizer != "adamw"
        if self.in_8bit:
            self.optimizer = make_adamw(cfg.optimizer, groups, **adam_settings(cfg))
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **adam_settings(cfg))  # one pass over memory

    def score(self, micro: MicroBatch) -> Tensor:
        return self.scorer(micro)

    def train(self, mode: bool) -> None:
        self.scorer.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; during the last backward, buckets that are complete are sent."""
        if self.buckets is not None:
            self.buckets.sending = last
        loss.backward()
        if self.fixed is not None:
            self.fixed.add()

    def step(self, lr: float, max_norm: float) -> float:
        """Sum over ranks, clip, step; when the norm is not finite, only drop the gradients."""
        if self.buckets is not None:
            self.buckets.finish()
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a rank without a micro-batch adds zeros
                parameter.grad = torch.zeros_like(parameter)
        if self.fixed is not None:
            self.fixed.finish(self.world.size)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        if math.isfinite(norm):
            if norm > max_norm:
                torch._foreach_mul_(gradients, max_norm / norm)
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def forget(self) -> None:
        """Drop gradients, except those in buckets that were sent: they were complete, and other ranks add them."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.fixed is not None:
            self.fixed.clear()
        if self.buckets is not None:
            self.buckets.forget()

    def local_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Weights, also frozen ones, and moments."""
        for name, parameter in self.scorer.model.named_parameters():
            yield name, parameter.data
            for moment, values in self._state(parameter).items():
                yield f"{moment} of {name}", values

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the trained weights."""
        for name, parameter in self.parameters.items():
            yield name, parameter.detach()

    def moments(self) -> Iterable[Piece]:
        """The moments of every W-th parameter: all ranks have the same moments, each yields a part."""
        for i, (name, parameter) in enumerate(self.parameters.items()):
            if i % self.world.size == self.world.rank:
                for moment, values in self._state(parameter).items():
                    flat = values.detach().flatten()
                    yield Piece(name, moment, 0, flat.half() if flat.dtype == torch.uint8 else flat)

    def load_moments(self, read: ReadMoment, updates: int) -> None:
        """Put moments back."""
        for name, parameter in self.parameters.items() if updates else ():
            if self.in_8bit:
                fill_moments(self.optimizer, parameter, read, name, updates)
                continue
            state = {m: read(name, m, 0, parameter.numel()).view_as(parameter).to(parameter.device) for m in MOMENTS}
            step = torch.tensor(float(updates), device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **state}

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's moments, by the names of Piece; empty before its first update."""
        state = self.optimizer.state.get(parameter, {})
        return moments_of(state) if self.in_8bit else {moment: state[moment] for moment in MOMENTS if moment in state}


def trainable(scorer: Scorer) -> dict[str, nn.Parameter]:
    """The model's trainable parameters, by the names in its checkpoints."""
    return {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay for matrices, none for norms and biases."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adam_settings(cfg: Config) -> dict[str, Any]:
    """AdamW's keyword arguments."""
    return {"lr": cfg.lr, "betas": (cfg.adam_beta1, cfg.adam_beta2)}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
