"""When memory runs out: halve the work and go on, remember the size, give up at the smallest.

Only work without a collective inside is tried again: a rollout chunk, and on backends with whole weights a
micro-batch. So no other rank notices but by waiting.
"""

import gc

import torch

from grpo.errors import UserError

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


class OutOfMemory(UserError):
    """Memory ran out and nothing is left to halve. Raised on one rank."""

    on_one_rank = True


def ran_out(error: BaseException) -> bool:
    """Whether an exception of torch's means that an allocation failed, on CPU or GPU.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    >>> ran_out(RuntimeError("shape mismatch"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class FittingSize:
    """How much of a kind of work fits into memory at once, as far as is known: rows or tokens."""

    def __init__(self, phase: str, setting: str, unit: str):
        self.phase = phase
        self.setting = setting
        self.unit = unit
        self.size: int | None = None  # None: nothing has failed yet
        self.halvings = 0
        self.failed_at_smallest = False

    def part(self, wanted: int) -> int:
        """As much of the wanted work as may be tried at once; 1 at least."""
        return wanted if self.size is None else max(1, min(wanted, self.size))

    def halve(self, tried: int, smallest: bool, shape: str) -> None:
        """Remember that `tried` did not fit. Raises OutOfMemory at the second failure of the smallest piece in a row.

        Call outside the `except` block: the exception's frames keep tensors alive.
        """
        if smallest and self.failed_at_smallest:
            raise OutOfMemory(
                f"{self.phase}: out of memory with the smallest piece of work, {shape}, twice. Shorten "
                f"max_prompt_length or max_generate_length, use a smaller model, or start fewer processes on this "
                f"machine. ({self.setting} was down to {tried} {self.unit} by itself.)"
            )
        self.failed_at_smallest = smallest
        self.size = max(1, tried // 2)
        self.halvings += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def fitted(self) -> None:
        """A piece of work went through."""
        self.failed_at_smallest = False
