"""Whole weights on every rank: a single process, or data parallel over ranks.

Gradients are summed in flat buckets, each sent as soon as the last micro-batch's backward is done with it
(`BucketSum`). torch's DistributedDataParallel is not used: it averages where our contract sums, expects the
forward to go through its wrapper (ours calls body and head apart), and hangs when a rank has no micro-batch.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo.config.settings import Config
from grpo.forward.logprobs import Scorer
from grpo.models.quantization import fill_moments, make_adamw, moments_of
from grpo.runtime.distributed import World
from grpo.training.backends import MOMENTS, Piece, ReadMoment
from grpo.types import MicroBatch

BUCKET_ELEMENTS = 2**23  # 32 MB of fp32


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
        """Log-probs [B, T]."""
        return self.scorer(micro)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.scorer.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; during the last one's backward, buckets that are whole leave for the sum."""
        if self.buckets is not None:
            self.buckets.sending = last
        loss.backward()
        if self.fixed is not None:
            self.fixed.take()

    def step(self, lr: float, max_norm: float) -> float:
        """Sum, clip, step; without a finite norm, only forget the gradients."""
        if self.buckets is not None:
            self.buckets.give()
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a rank without micro-batches adds zeros
                parameter.grad = torch.zeros_like(parameter)
        if self.fixed is not None:
            self.fixed.give(self.world.size)
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
        """Drop gradients, those excepted that other ranks are adding already: they were whole."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.fixed is not None:
            self.fixed.clear()
        if self.buckets is not None:
            self.buckets.forget()

    def held(self) -> Iterable[tuple[str, Tensor]]:
        """Weights, frozen ones too, and moments."""
        for name, parameter in self.scorer.model.named_parameters():
            yield name, parameter.data
            for moment, values in self._state(parameter).items():
                yield f"{moment} of {name}", values

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the current weights."""
        for name, parameter in self.parameters.items():
            yield name, parameter.detach()

    def moments(self) -> Iterable[Piece]:
        """Every W-th parameter's moments: all ranks hold the same, each gives a share."""
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
        """A parameter's moments, by the names that checkpoints use; nothing before its first update."""
        state = self.optimizer.state.get(parameter, {})
        return moments_of(state) if self.in_8bit else {moment: state[moment] for moment in MOMENTS if moment in state}


class BucketSum:
    """Gradients summed over ranks in flat buckets, which leave while the backward goes on.

    Buckets follow the backward: the last parameters come first. A gradient moves into its bucket when it is first
    added, and stays there as a view: later micro-batches add to it in place, the sum arrives in it, nothing is copied
    back. Every rank sends all buckets in one fixed order, each after the one before, whatever becomes ready first; so
    neither data nor memory nor a rank without work changes which collectives meet.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.buckets = _buckets(parameters[::-1])
        self.bucket_of = {parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket}
        self.sums: list[tuple[Tensor, dist.Work]] = []  # of the buckets that have left
        self.forget()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._added)

    def forget(self) -> None:
        """Start the minibatch anew. Buckets that have left keep what they hold: it was whole, others add to it."""
        self.sending = False  # whether the backward that runs is the minibatch's last
        self.kept = len(self.sums)  # buckets that left in an earlier try
        self.flats: dict[int, Tensor] = {}
        self.placed: set[Tensor] = set()  # parameters whose gradient is a view of its bucket
        self.missing: list[set[Tensor]] = [set(bucket) for bucket in self.buckets]  # whose gradient is not final yet

    def give(self) -> None:
        """Send what has not left, wait for all sums, put them into the gradients, start anew."""
        while len(self.sums) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sums, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        self.sums = []
        self.forget()

    def _added(self, parameter: Tensor) -> None:
        """Called by autograd once a backward for each parameter, when all its uses are in its gradient."""
        index = self.bucket_of[parameter]
        if index < self.kept:  # memory ran out after it had left: what it holds serves
            parameter.grad = None
            return
        self._place(parameter)
        if self.sending:
            assert parameter in self.missing[index], "a gradient was added to after it was taken for final"
            self.missing[index].remove(parameter)
            while len(self.sums) < len(self.buckets) and not self.missing[len(self.sums)]:
                self._send()

    def _place(self, parameter: Tensor) -> None:
        """Move a gradient into its bucket, once; one that is a bucket of its own stays where it is."""
        if parameter in self.placed:
            return
        index = self.bucket_of[parameter]
        bucket, gradient = self.buckets[index], parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if len(bucket) == 1:
            self.flats[index] = gradient.view(-1)
        else:
            if index not in self.flats:
                self.flats[index] = gradient.new_empty(sum(p.numel() for p in bucket))
            parts = self.flats[index].split([p.numel() for p in bucket])
            view = next(part for p, part in zip(bucket, parts, strict=True) if p is parameter).view_as(parameter)
            gradient = view.copy_(gradient)
        parameter.grad = gradient
        self.placed.add(parameter)

    def _send(self) -> None:
        """Let the next bucket leave, with zeros for parameters that got no gradient."""
        index = len(self.sums)
        for parameter in self.buckets[index]:
            self._place(parameter)
        flat = self.flats[index]
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sums.append((flat, work))


class FixedPointSum:
    """Gradients summed as integers: such sums are associative, so neither order nor the number of ranks matters.

    A micro-batch's gradient is rounded to multiples of 2^-48 and added in int64. What is not finite or not
    below 2^7 in size poisons the whole sum with NaN, which the norm then shows on every rank.
    """

    SCALE = 2.0**48
    LIMIT = 2.0**7  # 2^63 / 2^48 / 2^7: 256 such terms fit before the integers overflow

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.sums = [torch.zeros(p.numel(), dtype=torch.int64, device=p.device) for p in parameters]
        self.poison = torch.zeros(1, dtype=torch.int64, device=parameters[0].device)

    def take(self) -> None:
        """Move this micro-batch's gradients into the sum."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is not None:
                values = parameter.grad.view(-1).double()
                good = values.abs() < self.LIMIT  # False for NaN
                self.poison += (~good).any()
                total += (torch.where(good, values, 0.0) * self.SCALE).round().long()
                parameter.grad = None

    def give(self, world_size: int) -> None:
        """Sum over ranks, put the result into the gradients, start anew."""
        if world_size > 1:
            for total in [*self.sums, self.poison]:
                dist.all_reduce(total)
        poisoned = bool(self.poison.any())
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            gradient = (total.double() / self.SCALE).float().view_as(parameter)
            assert parameter.grad is not None
            parameter.grad.copy_(gradient * torch.nan if poisoned else gradient)
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        for total in [*self.sums, self.poison]:
            total.zero_()


def trainable(scorer: Scorer) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by the names its checkpoints use."""
    return {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, norms and biases do not."""
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


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if buckets[-1] and size + tensor.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
