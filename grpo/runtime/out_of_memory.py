"""Out of memory: halve the work, remember the size and continue; fail at the smallest size.

Only work without collectives is repeated: a rollout chunk, and on backends with whole weights a micro-batch. The other
ranks only wait longer.
"""

import gc

import torch

from grpo.errors import UserError

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


class OutOfMemory(UserError):
    """The smallest piece of work does not fit into memory. Raised on one rank."""

    on_one_rank = True


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on CPU or GPU.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    >>> ran_out(RuntimeError("shape mismatch"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class FittingSize:
    """The largest size of one kind of work (rows or tokens) that is believed to fit into memory."""

    def __init__(self, phase: str, setting: str, unit: str):
        self.phase = phase
        self.setting = setting
        self.unit = unit
        self.size: int | None = None  # None: no allocation has failed yet
        self.halvings = 0
        self.failed_at_smallest = False

    def part(self, wanted: int) -> int:
        """The size to try at once, for a wanted size; at least 1."""
        return wanted if self.size is None else max(1, min(wanted, self.size))

    def halve(self, tried: int, smallest: bool, shape: str) -> None:
        """Record that `tried` did not fit. Raises OutOfMemory when the smallest piece fails twice in a row.

        Call it outside of the `except` block: the exception's frames keep tensors alive.
        """
        if smallest and self.failed_at_smallest:
            raise OutOfMemory(
                f"{self.phase}: out of memory with the smallest piece of work, {shape}, twice. Shorten "
                f"max_prompt_length or max_generate_length, use a smaller model, or start fewer processes on this "
                f"machine. ({self.setting} had been reduced to {tried} {self.unit}.)"
            )
        self.failed_at_smallest = smallest
        self.size = max(1, tried // 2)
        self.halvings += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def fitted(self) -> None:
        """Record that a piece of work fitted."""
        self.failed_at_smallest = False
