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
from grpo.rewards import Failure, Reward, Sample
from grpo.rewards.calls import Call
from grpo.rewards.pool import Rewards
from grpo.types import FACTS, Completion, Prompt, Pulse, Table

REPORTED_FAILURES = 3  # of one function in a step, on each rank
FAILED, LATE = 1.0, 2.0  # why a function gave no score for a row
NO_SCORE = float("nan")


@dataclass(frozen=True)
class Scored:
    """This rank's completions with what the reward functions said."""

    completions: Sequence[Completion]
    samples: list[Sample]
    scores: np.ndarray  # [len(completions), K] float64, NaN where a function does not apply
    faults: np.ndarray  # [len(completions), K] 0, FAILED or LATE


def score(
    rewards: Rewards, prompts: Sequence[Prompt], completions: Sequence[Completion], num_generations: int,
    tokenizer: PreTrainedTokenizerBase, as_messages: bool, report: Callable[[str], None],
    pulse: Pulse = lambda: False,
) -> Scored:  # fmt: skip
    """Score this rank's completions: one by one, or by whole groups for rewards that see groups.

    `report` gets a line for each of a function's first failures. When `pulse` says stop, what is not scored yet stays
    without a score, and counts as no failure.
    """
    samples = [
        _sample(completion, prompts[completion.sample // num_generations], tokenizer, as_messages)
        for completion in completions
    ]
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(completions)), key=lambda i: completions[i].sample):
        groups.setdefault(completions[i].sample // num_generations, []).append(i)
    singles = [[i] for i in range(len(samples))]
    calls = [
        Call(k, tuple(rows))
        for k, reward in enumerate(rewards.rewards)
        for rows in (groups.values() if reward.sees_group else singles)
    ]
    scores, faults = (
        np.full((len(samples), len(rewards.rewards)), NO_SCORE),
        np.zeros((len(samples), len(rewards.rewards))),
    )
    failures: list[list[Failure]] = [[] for _ in rewards.rewards]
    for made, answer in zip(calls, rewards.run(samples, calls, pulse), strict=True):
        for row, outcome in zip(made.rows, answer.outcomes if answer else [], strict=answer is not None):
            if isinstance(outcome, str):
                assert answer is not None
                name = rewards.rewards[made.k].name
                failures[made.k].append(Failure(name, outcome, samples[row], answer.timeout))
                faults[row, made.k] = LATE if answer.timeout else FAILED
            elif outcome is not None:
                scores[row, made.k] = outcome
    for of_one in failures:
        for failure in of_one[:REPORTED_FAILURES]:
            report(str(failure))
    return Scored(completions, samples, scores, faults)


def combine(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[N, K] scores, NaN where a function does not apply -> [N] rewards, NaN where none applies.

        reward of a row = sum of weight * score over the functions that apply

    A row to which none applies takes no part in its group's statistics and gets advantage 0.

    >>> combine(np.array([[1.0, np.nan], [np.nan, np.nan]]), [0.5, 1.0]).tolist()
    [0.5, nan]
    """
    applies = ~np.isnan(scores)
    total = (np.where(applies, scores, 0.0) * np.asarray(weights)).sum(-1)
    return np.where(applies.any(-1), total, NO_SCORE)


def _sample(completion: Completion, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, as_messages: bool) -> Sample:
    ids = completion.token_ids.tolist()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not as_messages:
        return Sample(prompt.text, text, ids, prompt.columns)
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    return Sample(messages, [{"role": "assistant", "content": text}], ids, prompt.columns)


def gather(
    world: World, cfg: Config, rewards: Sequence[Reward], scored: Scored, notices: Sequence[float] = ()
) -> Table:
    """Complete the table over ranks. Raises UserError, on every rank alike, when too many calls failed.

    notices: numbers of this rank's own that all ranks should see, such as a request to stop; a few at most.
    """
    num_rows = prompts_per_step(cfg) * cfg.num_generations
    num_functions = len(rewards)  # scores, facts, faults; below the rows, one line a rank
    table = np.zeros((num_rows + world.size, num_functions + len(FACTS) + num_functions))
    table[num_rows + world.rank, : len(notices)] = notices
    for i, completion in enumerate(scored.completions):
        facts = (
            len(completion.token_ids), completion.finish == "stop", completion.finish == "error", completion.clamped,
            float(completion.sampler_logprobs.sum(dtype=np.float64)), float(np.count_nonzero(scored.faults[i])),
            world.rank,
        )  # fmt: skip
        table[completion.sample] = [*scored.scores[i], *map(float, facts), *scored.faults[i]]
    table, noticed = np.split(world.sum_rows(table), [num_rows])
    parts, facts_table, faults = np.split(table, [num_functions, num_functions + len(FACTS)], axis=1)
    check_failures(cfg, faults, [r.name for r in rewards])
    facts_of = dict(zip(FACTS, facts_table.T, strict=True)) | {
        _faults_of(r.name): faults[:, k] for k, r in enumerate(rewards)
    }
    total = combine(parts, [reward.weight for reward in rewards])
    return Table([r.name for r in rewards], parts, total, facts_of, cfg.num_generations, noticed)


def _faults_of(name: str) -> str:
    """Under which name a table's facts hold the faults of a function, see Scored."""
    return f"faults of {name}"


def check_failures(cfg: Config, faults: np.ndarray, names: Sequence[str]) -> None:
    """Stop when a broken function would train garbage. `faults`: see Scored, all rows. Raises UserError."""
    num_rows = len(faults)
    for name, column in zip(names, faults.T, strict=True):
        failed, late = np.count_nonzero(column), np.count_nonzero(column == LATE)
        if failed > cfg.max_reward_failures * num_rows:
            raise UserError(
                f"rewards: {name} failed on {failed} of {num_rows} completions in one step, {late} of them for want of "
                f"an answer within the time limit (reward_timeout_s {cfg.reward_timeout_s:g}); allowed is a share of "
                f"{cfg.max_reward_failures:g} (max_reward_failures). The reasons are above: mend the function."
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
        faults = table.facts.get(_faults_of(name), np.zeros(len(table.scores)))
        metrics[f"reward/{short}/failures"] = float((faults != 0).mean())
        metrics[f"reward/{short}/timeouts"] = float((faults == LATE).mean())
        if len(column):
            metrics |= {f"reward/{short}/mean": float(column.mean()), f"reward/{short}/std": float(column.std())}
    return metrics
