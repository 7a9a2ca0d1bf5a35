"""The plan of a step: which rows form a minibatch (one optimizer step), which a micro-batch, and which rank owns it.

Every rank computes the same plan from the same lengths. Micro-batches hold at most a budget of tokens, and less where
that keeps more ranks busy; with `deterministic` the cut is the same for any number of ranks, only the owners differ.
Rows whose gradient is exactly zero are not computed, but the denominators count them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from grpo.config.settings import Config, kl_in_loss
from grpo.runtime.shares import cut_for, shares_of, split_evenly
from grpo.training.entropy import needs_every_row
from grpo.training.shared_prompt_batches import SharedPromptCut
from grpo.types import Prompt


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimizer step, over all ranks."""

    rows: tuple[int, ...]  # all, also those without gradient: the denominators count them
    micro_batches: tuple[tuple[int, ...], ...]  # the rows that carry gradient
    owners: tuple[int, ...]  # the rank of each micro-batch
    shares_prompts: bool = True  # compute rows without padding, each prompt once per group; else padded

    def of_rank(self, rank: int) -> list[tuple[int, ...]]:
        """The rows of each micro-batch of one rank."""
        return [micro for micro, owner in zip(self.micro_batches, self.owners, strict=True) if owner == rank]


def cut_micro_batches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """Pack rows, longest first, into padded micro-batches of at most max_tokens (at least one row).

    >>> cut_micro_batches([0, 1, 2], lengths=[4, 10, 5], max_tokens=10)
    [(1,), (2, 0)]
    """
    micro_batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for row in sorted(rows, key=lambda n: (-lengths[n], n)):
        if current and (len(current) + 1) * lengths[current[0]] > max_tokens:
            micro_batches.append(tuple(current))
            current = []
        current.append(row)
    return [*micro_batches, tuple(current)] if current else micro_batches


def assign(costs: Sequence[int], world_size: int) -> list[int]:
    """Owner of each micro-batch: the most expensive first, each to the rank with the least work so far.

    >>> assign([5, 4, 3], 2)
    [0, 1, 1]
    """
    load = [0] * world_size
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def make_plan(
    cfg: Config,
    prompts: Sequence[Prompt],
    lengths: np.ndarray,
    advantages: np.ndarray,
    world_size: int,
    shares_prompts: bool = True,
    num_trained: np.ndarray | None = None,
    chosen: Sequence[int] | None = None,
) -> list[Minibatch]:
    """Cut the rows of the chosen groups, p of each, into minibatches of whole groups, and those into micro-batches.

    lengths, advantages, num_trained: [N]; num_trained None: every token is trained. A row without a trained token
    carries no gradient, nor one whose advantage is 0, without KL, balancing loss and entropy. shares_prompts: see
    Minibatch. chosen: None for all groups.
    """
    group = cfg.num_generations
    lengths_of, prompts_of = lengths.tolist(), [prompt.token_ids for prompt in prompts]
    row_tokens = [len(prompts_of[n // group]) + length for n, length in enumerate(lengths_of)]
    counts = lengths if num_trained is None else num_trained
    every = kl_in_loss(cfg) or cfg.router_aux_loss_coef > 0 or needs_every_row(cfg)  # also of advantage 0
    carries = [bool(count > 0 and (every or gain != 0)) for count, gain in zip(counts, advantages, strict=True)]
    plan = []
    shares = shares_of(cfg, world_size)
    chosen = range(len(prompts)) if chosen is None else chosen
    for part in split_evenly(len(chosen), cfg.num_minibatches):
        rows = [p * group + g for p in chosen[part.start : part.stop] for g in range(group)]
        computed = [n for n in rows if carries[n]]
        if shares_prompts:
            cut = SharedPromptCut(prompts_of, lengths_of, group)
            micro_batches = cut_for(shares, cfg.micro_batch_tokens, partial(cut.micro_batches, computed))
            costs = [cut.cost(micro) for micro in micro_batches]
        else:
            micro_batches = cut_for(shares, cfg.micro_batch_tokens, partial(cut_micro_batches, computed, row_tokens))
            costs = [len(micro) * row_tokens[micro[0]] for micro in micro_batches]
        plan.append(Minibatch(tuple(rows), tuple(micro_batches), tuple(assign(costs, world_size)), shares_prompts))
    return plan


def trainers_of(plan: Sequence[Minibatch]) -> dict[int, int]:
    """Row -> the rank that trains on it."""
    return {
        row: owner
        for minibatch in plan
        for micro, owner in zip(minibatch.micro_batches, minibatch.owners, strict=True)
        for row in micro
    }
