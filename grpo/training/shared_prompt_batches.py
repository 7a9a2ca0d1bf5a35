"""Micro-batches of rows without padding that share the prompts of their groups: the plan of the fast path.

The simple form, padded rows, is `cut_micro_batches` in minibatches.py.
"""

from collections.abc import Sequence

from grpo.forward.flat_rows import common_prefix


def cut_shared_prompts(
    rows: Sequence[int], prompts: Sequence[int], lengths: Sequence[int], group: int, max_tokens: int, prefix: int = 0
) -> list[tuple[int, ...]]:
    """Pack rows group by group, longest first, into micro-batches of at most max_tokens (at least one row).

    prompts, lengths: tokens of each row's prompt and completion; row n is of group n // group. A micro-batch counts the
    prompt of a group once, and the first `prefix` tokens, which all prompts have in common, once.

    >>> cut_shared_prompts([0, 1, 2, 3], prompts=[5, 5, 5, 5], lengths=[4, 3, 9, 2], group=2, max_tokens=16)
    [(2, 3), (0, 1)]
    """
    longest: dict[int, int] = {}
    for n in rows:
        longest[n // group] = max(longest.get(n // group, 0), prompts[n] + lengths[n])
    micro_batches: list[tuple[int, ...]] = []
    current: list[int] = []
    used = prefix
    own = [tokens - prefix for tokens in prompts]  # of each row's prompt, after the common prefix
    for n in sorted(rows, key=lambda n: (-longest[n // group], n // group, -lengths[n], n)):
        shared = bool(current) and current[-1] // group == n // group
        if current and used + lengths[n] + (0 if shared else own[n]) > max_tokens:
            micro_batches.append(tuple(current))
            current, used, shared = [], prefix, False
        used += lengths[n] + (0 if shared else own[n])
        current.append(n)
    return [*micro_batches, tuple(current)] if current else micro_batches


def plan_shared_prompts(
    rows: Sequence[int], prompts: Sequence[Sequence[int]], lengths: Sequence[int], group: int, max_tokens: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Micro-batches of `rows`, and how many tokens each computes.

    prompts: token ids of each prompt of the step; lengths: [N] tokens of each completion.
    """
    prefix = common_prefix(prompts)
    prompt_lengths = [len(prompts[n // group]) for n in range(len(lengths))]
    micro_batches = cut_shared_prompts(rows, prompt_lengths, lengths, group, max_tokens, prefix)
    costs = []
    for micro in micro_batches:
        prompt_tokens = {n // group: prompt_lengths[n] - prefix for n in micro}  # by group
        costs.append(prefix + sum(prompt_tokens.values()) + sum(lengths[n] for n in micro))
    return micro_batches, costs
