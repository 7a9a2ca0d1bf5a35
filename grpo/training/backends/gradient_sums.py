"""Sums of gradients over ranks: in buckets that are sent during the backward, or in fixed point, order-independent.

The simple form is one all-reduce of each gradient after the last backward; tests/training/test_bucket_sum.py compares.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 2**23  # 32 MB of fp32


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
