"""Silent corruption: a bit that flips in memory between two updates is found before the next update.

A rank computes checksums of its weights and optimizer state after each update and again before the next one. Nothing
changes these tensors in between, and any single flipped bit changes the sum.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits read as integers, modulo 2^64: [] int64, on the tensor's device.

    >>> values = torch.tensor([1.0, 2.0, 3.0])
    >>> before = checksum(values)
    >>> values.view(torch.int32)[1] ^= 1 << 30
    >>> bool(checksum(values) == before)
    False
    """
    flat = tensor.contiguous().view(-1)
    width = flat.element_size()
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    pairs = 8 // width
    if words.storage_offset() % pairs:
        words = words.clone()  # equal bits give equal sums, wherever they lie
    paired = len(words) // pairs * pairs  # eight bytes at a time: no conversion, 30 times faster on CPU
    return words[:paired].view(torch.int64).sum() + words[paired:].sum(dtype=torch.int64)


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Name -> checksum of each tensor. One device sync."""
    named = [(name, checksum(tensor)) for name, tensor in tensors if tensor.numel()]
    if not named:
        return {}
    device = named[0][1].device
    values = torch.stack([value.to(device) for _, value in named]).tolist()
    return dict(zip((name for name, _ in named), values, strict=True))


def first_difference(before: dict[str, int], after: dict[str, int]) -> str | None:
    """The first name whose checksum differs; None when all are equal."""
    return next((name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)), None)
