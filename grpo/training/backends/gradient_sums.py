"""Sums of gradients over ranks: in buckets that are sent during the backward, or in fixed point, in any order.

The simple form is one all-reduce of each gradient after the last backward; tests/training/test_bucket_sum.py compares.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 2**23  # 32 MB of fp32


class BucketSum:
    """Gradients summed over ranks in flat buckets, which are sent while the backward goes on.

    Buckets follow the backward: the last parameters come first. A gradient is copied into its bucket when it is first
    added, and is a view of it from then on: later micro-batches add in place, the sum arrives in it, nothing is copied
    back. Every rank sends all buckets in one fixed order, whatever becomes ready first. So neither the data nor memory
    nor a rank without work changes which collectives meet.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.buckets = _buckets(parameters[::-1])
        self.bucket_of = {parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket}
        self.sums: list[tuple[Tensor, dist.Work]] = []  # of the buckets that were sent
        self.forget()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._added)

    def forget(self) -> None:
        """Start the minibatch again. Buckets that were sent stay: they were complete, and other ranks add them."""
        self.sending = False  # whether the backward that runs is the minibatch's last
        self.num_sent_before = len(self.sums)  # buckets sent by an earlier attempt, which ran out of memory
        self.flats: dict[int, Tensor] = {}  # bucket -> its memory, [elements of the bucket]
        self.placed: set[Tensor] = set()  # parameters whose gradient is a view of its bucket
        self.missing: list[set[Tensor]] = [set(bucket) for bucket in self.buckets]  # whose gradient is not final yet

    def finish(self) -> None:
        """Send the remaining buckets, wait for all sums and put them into the gradients."""
        while len(self.sums) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sums, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        self.sums = []
        self.forget()

    def _added(self, parameter: Tensor) -> None:
        """Autograd calls it once per backward for each parameter, when all its uses are in its gradient."""
        index = self.bucket_of[parameter]
        if index < self.num_sent_before:  # the earlier attempt sent the same gradient
            parameter.grad = None
            return
        self._place(parameter)
        if self.sending:
            # this gradient is final
            assert parameter in self.missing[index], "a gradient was added to after it was final"
            self.missing[index].remove(parameter)
            # send every bucket that is complete, in order
            while len(self.sums) < len(self.buckets) and not self.missing[len(self.sums)]:
                self._send()

    def _place(self, parameter: Tensor) -> None:
        """Make a gradient a view of its bucket, once."""
        if parameter in self.placed:
            return
        index = self.bucket_of[parameter]
        bucket, gradient = self.buckets[index], parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if len(bucket) == 1:
            # the gradient itself is the bucket
            self.flats[index] = gradient.view(-1)
        else:
            # copy it to its place
            if index not in self.flats:
                self.flats[index] = gradient.new_empty(sum(p.numel() for p in bucket))
            parts = self.flats[index].split([p.numel() for p in bucket])
            view = next(part for p, part in zip(bucket, parts, strict=True) if p is parameter).view_as(parameter)
            gradient = view.copy_(gradient)
        parameter.grad = gradient
        self.placed.add(parameter)

    def _send(self) -> None:
        """Start the sum of the next bucket, with zeros for parameters without a gradient."""
        index = len(self.sums)
        for parameter in self.buckets[index]:
            self._place(parameter)
        flat = self.flats[index]
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sums.append((flat, work))


class FixedPointSum:
    """Gradients summed as integers: such sums are associative, so neither order nor the number of ranks matters.

    A micro-batch's gradient is rounded to multiples of 2^-48 and added in int64. A value that is not finite, or not
    below 2^7 in size, makes the whole sum NaN, and so the norm on every rank.
    """

    SCALE = 2.0**48
    LIMIT = 2.0**7  # 2^63 / 2^48 / 2^7: 256 such terms fit before the integers overflow

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.sums = [torch.zeros(p.numel(), dtype=torch.int64, device=p.device) for p in parameters]
        self.num_bad = torch.zeros(1, dtype=torch.int64, device=parameters[0].device)  # gradients with a bad value

    def add(self) -> None:
        """Move a micro-batch's gradients into the sums."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is not None:
                values = parameter.grad.view(-1).double()
                good = values.abs() < self.LIMIT  # False for NaN
                self.num_bad += (~good).any()
                # to fixed point: multiples of 2^-48
                total += (torch.where(good, values, 0.0) * self.SCALE).round().long()
                parameter.grad = None

    def finish(self, world_size: int) -> None:
        """Sum over ranks and put the result into the gradients."""
        if world_size > 1:
            for total in [*self.sums, self.num_bad]:
                dist.all_reduce(total)
        is_bad = bool(self.num_bad.any())
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            # back to fp32
            gradient = (total.double() / self.SCALE).float().view_as(parameter)
            assert parameter.grad is not None
            parameter.grad.copy_(gradient * torch.nan if is_bad else gradient)
        self.clear()

    def clear(self) -> None:
        """Set the sums to zero."""
        for total in [*self.sums, self.num_bad]:
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
