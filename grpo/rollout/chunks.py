"""The cut of a step's rows into chunks. What a row samples does not depend on it, up to rounding."""

import math

from grpo.runtime.shares import next_multiple, split_evenly


def cut_chunks(
    num_prompts: int, num_generations: int, chunk_rows: int, ranks: int = 1, whole_groups: bool = False
) -> list[list[int]]:
    """Cut the rows 0 … P*G-1 into chunks of similar sizes, as many for each of the ranks where there are enough rows.

    Groups stay whole where there are enough of them, or by `whole_groups`, which needs chunk_rows >= G.

    >>> cut_chunks(3, 2, 4)
    [[0, 1, 2, 3], [4, 5]]
    >>> cut_chunks(1, 4, 3), cut_chunks(2, 2, 64, ranks=2), cut_chunks(1, 4, 64, ranks=2)
    ([[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]])
    """
    rows = range(num_prompts * num_generations)
    groups_in_chunk = chunk_rows // num_generations
    if groups_in_chunk:
        num_chunks = next_multiple(math.ceil(num_prompts / groups_in_chunk), ranks)
        if num_chunks <= num_prompts or whole_groups:
            parts = _larger_first(num_prompts, min(num_chunks, num_prompts))
            return [list(rows[part.start * num_generations : part.stop * num_generations]) for part in parts]
    num_chunks = min(next_multiple(math.ceil(len(rows) / chunk_rows), ranks), len(rows))
    return [list(part) for part in _larger_first(len(rows), num_chunks)]


def _larger_first(num_items: int, num_parts: int) -> list[range]:
    return [range(num_items - part.stop, num_items - part.start) for part in split_evenly(num_items, num_parts)[::-1]]
