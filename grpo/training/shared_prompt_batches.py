"""Micro-batches of rows without padding that share the prompts of their groups: the plan of the fast path.

The simple form, padded rows, is `cut_micro_batches` in minibatches.py.
"""

from collections.abc import Sequence

from grpo.forward.flat_rows import common_prefix


class SharedPromptCut:
    """A step's rows, to be packed into micro-batches. Row n is of group n // group; its prompt is that of the group."""

    def __init__(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], group: int):
        """prompts: token ids of each prompt; lengths: [N] tokens of each completion."""
        self.prefix = common_prefix(prompts)
        self.own = [len(prompt) - self.prefix for prompt in prompts]  # of each prompt, after the common prefix
        self.lengths, self.group = lengths, group

    def micro_batches(self, rows: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
        """Pack rows group by group, longest first, into micro-batches of at most max_tokens (at least one row).

        A micro-batch counts the prompt of a group once, and what all prompts have in common once.

        >>> SharedPromptCut([[0] * 5, [1] * 5], [4, 3, 9, 2], group=2).micro_batches([0, 1, 2, 3], max_tokens=16)
        [(2, 3), (0, 1)]
        """
        group, lengths = self.group, self.lengths
        longest: dict[int, int] = {}
        for n in rows:
            longest[n // group] = max(longest.get(n // group, 0), self.own[n // group] + lengths[n])
        micro_batches: list[tuple[int, ...]] = []
        current: list[int] = []
        used = self.prefix
        for n in sorted(rows, key=lambda n: (-longest[n // group], n // group, -lengths[n], n)):
            shared = bool(current) and current[-1] // group == n // group
            if current and used + lengths[n] + (0 if shared else self.own[n // group]) > max_tokens:
                micro_batches.append(tuple(current))
                current, used, shared = [], self.prefix, False
            used += lengths[n] + (0 if shared else self.own[n // group])
            current.append(n)
        return [*micro_batches, tuple(current)] if current else micro_batches

    def cost(self, micro_batch: Sequence[int]) -> int:
        """Tokens that a micro-batch computes."""
        prompts = {n // self.group for n in micro_batch}
        return self.prefix + sum(self.own[p] for p in prompts) + sum(self.lengths[n] for n in micro_batch)
