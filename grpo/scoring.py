"""Scores of a step's rows, and the O(N) table of numbers that every rank gets to see.

Every rank scores the completions it sampled and fills their rows of a float64 table; one sum over ranks
completes it. All statistics are then computed from the whole table, alike on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.advantages import equal_groups, group_advantages
from grpo.config import Config, prompts_per_step
from grpo.distributed import World
from grpo.errors import UserError
from grpo.rewards import Failure, Reward, Sample, call, combine
from grpo.types import FACTS, Completion, Prompt, Table

REPORTED_FAILURES = 3  # a step


@dataclass(frozen=True)
class Scored:
    """This rank's completions with what the reward functions said."""

    completions: Sequence[Completion]
    samples: list[Sample]
    scores: np.ndarray  # [len(completions), K] float64, NaN where a function does not apply
    failed: np.ndarray  # [len(completions)] calls that failed


def score(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence[Completion], num_generations: int,
    tokenizer: PreTrainedTokenizerBase, as_messages: bool, report: Callable[[str], None],
) -> Scored:  # fmt: skip
    """Score this rank's completions: one by one, or by whole groups for rewards that see groups.

    `report` gets a line for each of the first failures.
    """
    samples = [
        _sample(completion, prompts[completion.sample // num_generations], tokenizer, as_messages)
        for completion in completions
    ]
    scores, failed = np.full((len(samples), len(rewards)), np.nan), np.zeros(len(samples))
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(completions)), key=lambda i: completions[i].sample):
        groups.setdefault(completions[i].sample // num_generations, []).append(i)
    failures: list[Failure] = []
    for k, reward in enumerate(rewards):
        for rows in groups.values() if reward.sees_group else [[i] for i in range(len(samples))]:
            scores[rows, k], here = call(reward, [samples[i] for i in rows])
            failures += here
            for failure in here:
                failed[next(i for i in rows if samples[i] is failure.sample)] += 1
    for failure in failures[:REPORTED_FAILURES]:
        report(str(failure))
    return Scored(completions, samples, scores, failed)


def _sample(completion: Completion, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, as_messages: bool) -> Sample:
    ids = completion.token_ids.tolist()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not as_messages:
        return Sample(prompt.text, text, ids, prompt.columns)
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    return Sample(messages, [{"role": "assistant", "content": text}], ids, prompt.columns)


def gather(world: World, cfg: Config, rewards: Sequence[Reward], scored: Scored) -> Table:
    """Complete the table over ranks. Raises UserError, on every rank alike, when too many calls failed."""
    num_rows = prompts_per_step(cfg) * cfg.num_generations
    table = np.zeros((num_rows, len(rewards) + len(FACTS)))
    for i, completion in enumerate(scored.completions):
        facts = (
            len(completion.token_ids), completion.finish == "stop", completion.finish == "error", completion.clamped,
            float(completion.sampler_logprobs.sum(dtype=np.float64)), scored.failed[i],
            world.rank,
        )  # fmt: skip
        table[completion.sample] = [*scored.scores[i], *map(float, facts)]
    table = world.sum_rows(table)
    facts_of = dict(zip(FACTS, table[:, len(rewards) :].T, strict=True))
    check_failures(cfg, float(facts_of["failures"].sum()), num_rows * len(rewards), [r.name for r in rewards])
    parts = table[:, : len(rewards)]
    total = combine(parts, [reward.weight for reward in rewards])
    return Table([r.name for r in rewards], parts, total, facts_of, cfg.num_generations)


def check_failures(cfg: Config, failures: float, calls: int, names: Sequence[str]) -> None:
    """Stop when a broken reward would train garbage. Raises UserError."""
    if failures > cfg.max_reward_failures * calls:
        raise UserError(
            f"rewards: {failures:.0f} of {calls} calls of {', '.join(names)} failed in one step, allowed is a "
            f"share of {cfg.max_reward_failures} (max_reward_failures). The first ones are above: mend the function."
        )


def advantages_of(table: Table, cfg: Config) -> np.ndarray:
    """[N] advantages over whole groups; 0 for rows without a reward."""
    scale = cfg.scale_rewards == "group" and cfg.loss != "dr_grpo"
    return group_advantages(table.grouped, scale, cfg.advantage_clip).ravel()


def rollout_metrics(table: Table, advantages: np.ndarray, vocab_size: int) -> dict[str, float]:
    """What the table says about the rollout. Means are over all rows of all ranks."""
    tokens = table.lengths.sum()
    known = table.rewards[~np.isnan(table.rewards)]
    metrics = {
        "reward/mean": float(known.mean()) if len(known) else 0.0,
        "reward/std": float(known.std()) if len(known) else 0.0,
        "reward/zero_std_groups": float(equal_groups(table.grouped).mean()),
        "reward/failures": float(table.facts["failures"].sum()),
        "advantage/abs_mean": float(np.abs(advantages).mean()),
        "completions/length_mean": float(table.lengths.mean()),
        "completions/length_max": float(table.lengths.max()),
        "completions/length_min": float(table.lengths.min()),
        "completions/truncated": float(1 - (table.facts["stopped"] + table.facts["broken"]).mean()),
        "completions/broken": float(table.facts["broken"].sum()),
        "completions/tokens": float(tokens),
        "entropy": float(-table.facts["logprob_sum"].sum() / max(1, tokens)),
        "guards/clamped_logits": float(table.facts["clamped"].sum() / max(1, tokens * vocab_size)),
    }
    for k, name in enumerate(table.names):
        column = table.scores[:, k][~np.isnan(table.scores[:, k])]
        short = name.rpartition(":")[2]
        if len(column):
            metrics |= {f"reward/{short}/mean": float(column.mean()), f"reward/{short}/std": float(column.std())}
    return metrics
