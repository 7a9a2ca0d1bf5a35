"""Scores of a step's rows, and the table of all N rows that every rank gets.

Every rank scores the completions that it sampled and fills their rows of a float64 table; one sum over ranks completes
it. All statistics are then computed from the whole table, equally on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config, scales_advantages
from grpo.errors import UserError
from grpo.rewards import Failure, Reward, RewardInput, see_groups
from grpo.rewards.calls import Call
from grpo.rewards.logged import Logs
from grpo.rewards.pool import Rewards
from grpo.runtime.distributed import World
from grpo.training.advantages import group_advantages
from grpo.training.other_advantages import other_advantages
from grpo.types import FACTS, Completion, Notices, Prompt, Pulse, Table

REPORTED_FAILURES = 3  # of one function in a step, on each rank
FAILED, LATE = 1.0, 2.0  # why a function gave no score for a row
NO_SCORE = float("nan")


@dataclass(frozen=True)
class Scored:
    """This rank's completions and their scores."""

    completions: Sequence[Completion]
    inputs: list[RewardInput]
    scores: np.ndarray  # [len(completions), K] float64, NaN where a function does not apply
    faults: np.ndarray  # [len(completions), K] 0, FAILED or LATE
    num_rows: int  # of the step, over all ranks
    logs: Logs = field(default_factory=Logs)  # what reward functions logged


class Scoring:
    """Scores of this rank's completions in a step or an evaluation, computed while other rows are still sampled.

    Where rewards are slow (`Rewards.early`), `take` submits a completion at once, and a group with its last completion;
    `pulse` advances the calls, and `finish` waits for the rest. The result does not depend on when completions came.
    """

    def __init__(
        self,
        cfg: Config,
        rewards: Rewards,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        report: Callable[[str], None],
        pulse: Pulse = lambda: False,
        num_generations: int | None = None,
    ):
        """`report` gets one line for each of a function's first failures. num_generations: per prompt; None: as in cfg.

        Raises UserError when a worker cannot be started.
        """
        self.rewards, self.prompts, self.tokenizer, self.report = rewards, prompts, tokenizer, report
        self.num_generations = num_generations or cfg.num_generations
        self.as_messages = cfg.reward_inputs == "messages"
        self.grouped = see_groups(rewards.rewards)  # one rank has to sample all completions of a prompt
        self.run_pulse = pulse
        self.stopped = False
        self.submitted: dict[int, Completion] = {}  # by row, like the next two
        self.inputs: dict[int, RewardInput] = {}
        self.input_index: dict[int, int] = {}  # place among the inputs of this round, by which calls name rows
        self.open_groups: dict[int, list[int]] = {}  # submitted rows of groups that are not complete
        self.call_index: dict[tuple[int, tuple[int, ...]], int] = {}  # (function, rows) -> place among the calls
        rewards.begin()

    def pulse(self) -> bool:
        """The pulse for whoever samples: that of the run, and rewards advance."""
        if not self._stop():
            self.rewards.advance()
        return self.stopped

    def take(self, completions: Sequence[Completion]) -> None:
        """Accept completions that are final, each once. After a request to stop they may be cut and are ignored."""
        if self.rewards.early and not self.stopped:
            self._submit(completions)
            self.rewards.advance()

    def finish(self, completions: Sequence[Completion]) -> Scored:
        """Wait for the scores of all completions; the result has their order.

        When the pulse asks to stop, completions without a score stay without one, which is not a failure.
        """
        for completion in completions:
            earlier = self.submitted.get(completion.row, completion)
            assert np.array_equal(completion.token_ids, earlier.token_ids), "a completion changed after it was final"
        if not self.stopped:
            self._submit([c for c in completions if c.row not in self.submitted], last=True)
        answers = self.rewards.collect(self._stop)
        inputs = [self.inputs.get(c.row) or self._input(c) for c in completions]
        index_of = {c.row: i for i, c in enumerate(completions)}
        groups = [list(rows) for _, rows in groupby(sorted(index_of), lambda row: row // self.num_generations)]
        scores = np.full((len(inputs), len(self.rewards.rewards)), NO_SCORE)
        faults, logs = np.zeros_like(scores), Logs()
        for k, reward in enumerate(self.rewards.rewards):
            failures: list[Failure] = []
            for rows in groups if reward.sees_group else [[row] for row in index_of]:
                call = self.call_index.get((k, tuple(rows)))
                if call is None or (answer := answers[call]) is None:  # the run was asked to stop before
                    continue
                logs.add(reward.short, rows, answer.columns, answer.metrics)
                for row, outcome in zip(rows, answer.outcomes, strict=True):
                    i = index_of[row]
                    if isinstance(outcome, str):
                        failures.append(Failure(reward.name, outcome, inputs[i], answer.timeout))
                        faults[i, k] = LATE if answer.timeout else FAILED
                    elif outcome is not None:
                        scores[i, k] = outcome
            for failure in failures[:REPORTED_FAILURES]:
                self.report(str(failure))
        return Scored(completions, inputs, scores, faults, len(self.prompts) * self.num_generations, logs)

    def _stop(self) -> bool:
        self.stopped = self.run_pulse() or self.stopped
        return self.stopped

    def _submit(self, completions: Sequence[Completion], last: bool = False) -> None:
        """Submit the calls that these completions make possible; last: also those of incomplete groups."""
        for completion in completions:
            row = completion.row
            assert row not in self.submitted, "a completion was given twice"
            self.input_index[row] = len(self.input_index)
            self.submitted[row], self.inputs[row] = completion, self._input(completion)
            self.open_groups.setdefault(row // self.num_generations, []).append(row)
        ready = sorted(p for p, rows in self.open_groups.items() if last or len(rows) == self.num_generations)
        groups = [tuple(sorted(self.open_groups.pop(p))) for p in ready]
        singles = [(completion.row,) for completion in completions]
        calls = []
        for k, reward in enumerate(self.rewards.rewards):
            for rows in groups if reward.sees_group else singles:
                self.call_index[k, rows] = len(self.call_index)
                calls.append(Call(k, tuple(self.input_index[row] for row in rows)))
        self.rewards.submit([self.inputs[completion.row] for completion in completions], calls)

    def _input(self, completion: Completion) -> RewardInput:
        prompt = self.prompts[completion.row // self.num_generations]
        ids = completion.token_ids.tolist()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if not self.as_messages:
            return RewardInput(prompt.text, text, ids, prompt.columns)
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        return RewardInput(messages, [{"role": "assistant", "content": text}], ids, prompt.columns)


def combine(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[N, K] scores, NaN where a function does not apply -> [N] rewards, NaN where none applies.

        reward of a row = sum of weight * score over the functions that apply

    A row to which no function applies does not enter its group's statistics and gets advantage 0.

    >>> combine(np.array([[1.0, np.nan], [np.nan, np.nan]]), [0.5, 1.0]).tolist()
    [0.5, nan]
    """
    applies = ~np.isnan(scores)
    total = (np.where(applies, scores, 0.0) * np.asarray(weights)).sum(-1)
    return np.where(applies.any(-1), total, NO_SCORE)


def gather(
    world: World, cfg: Config, rewards: Sequence[Reward], scored: Scored, notices: Sequence[float] = ()
) -> Table:
    """Fill this rank's rows and sum over ranks: the table of the step. notices: this rank's line of Notices.

    Raises UserError, on every rank alike, when too many calls failed.

    >>> completion = Completion(1, np.array([5, 0], np.int32), np.array([-0.5, -0.25], np.float32), "stop")
    >>> scored = Scored([completion], [], scores=np.array([[3.0]]), faults=np.zeros((1, 1)), num_rows=2)
    >>> world, rewards = World(0, 1, 0, 1, device=None), [Reward("rewards.py:correct", weight=0.5)]
    >>> table = gather(world, Config(num_generations=2), rewards, scored, notices=(True, False))  # row 0: elsewhere
    >>> table.rewards.tolist(), table.lengths.tolist(), table.facts["stopped"].tolist(), table.notices.stop_requested
    ([0.0, 1.5], [0, 2], [0.0, 1.0], True)
    """
    names = [reward.name for reward in rewards]
    num_rows, K = scored.num_rows, len(rewards)
    # one line per row: scores, facts, faults; below them one per rank: its notices
    table = np.zeros((num_rows + world.size, K + len(FACTS) + K))
    table[num_rows + world.rank, : len(notices)] = notices
    for completion, scores, faults in zip(scored.completions, scored.scores, scored.faults, strict=True):
        facts = _facts_of(completion, faults, world.rank)
        table[completion.row] = [*scores, *(facts[name] for name in FACTS), *faults]

    table, notices_table = np.split(world.sum_rows(table), [num_rows])
    all_scores, facts_table, all_faults = np.split(table, [K, K + len(FACTS)], axis=1)
    check_failures(cfg, all_faults, names)
    weights = tuple(reward.weight for reward in rewards)
    totals, columns = combine(all_scores, weights), dict(zip(FACTS, facts_table.T, strict=True))
    return Table(names, all_scores, totals, columns, cfg.num_generations, Notices(notices_table), all_faults, weights)


def _facts_of(completion: Completion, faults: np.ndarray, rank: int) -> dict[str, float]:
    return {
        "length": len(completion.token_ids),
        "trained": np.count_nonzero(completion.trained),
        "stopped": completion.finish == "stop",
        "broken": completion.finish == "error",
        "clamped": completion.clamped,
        "logprob_sum": completion.sampler_logprobs[completion.trained].sum(dtype=np.float64),
        "entropy_sum": 0.0 if completion.entropy is None else completion.entropy[completion.trained].sum(dtype=float),
        "failures": np.count_nonzero(faults),
        "rank": rank,
    }


def check_failures(cfg: Config, faults: np.ndarray, names: Sequence[str]) -> None:
    """Raise UserError when a function failed on more rows than allowed. faults: [N, K], see Scored."""
    num_rows = len(faults)
    for name, column in zip(names, faults.T, strict=True):
        failed, late = np.count_nonzero(column), np.count_nonzero(column == LATE)
        if failed > cfg.max_reward_failures * num_rows:
            raise UserError(
                f"rewards: {name} failed on {failed} of {num_rows} completions in one step, {late} of them without "
                f"an answer within the time limit (reward_timeout_s {cfg.reward_timeout_s:g}); allowed is a share of "
                f"{cfg.max_reward_failures:g} (max_reward_failures). The reasons are above: fix the function."
            )


def advantages_of(table: Table, cfg: Config) -> np.ndarray:
    """[N] advantages over whole groups; 0 for rows without a reward."""
    if cfg.baseline == "group" and cfg.scale_rewards != "batch" and not (cfg.advantage or cfg.normalize_each_reward):
        return group_advantages(table.grouped, scales_advantages(cfg), cfg.advantage_clip).ravel()
    return other_advantages(table, cfg).ravel()
