"""Scores of a step's rows, and the O(N) table of numbers that every rank gets to see.

Every rank scores the completions it sampled and fills their rows of a float64 table; one sum over ranks
completes it. All statistics are then computed from the whole table, alike on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.rewards import Failure, Reward, RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import Rewards
from grpo.runtime.distributed import World
from grpo.training.advantages import group_advantages
from grpo.types import FACTS, Completion, Prompt, Pulse, Table

REPORTED_FAILURES = 3  # of one function in a step, on each rank
FAILED, LATE = 1.0, 2.0  # why a function gave no score for a row
NO_SCORE = float("nan")


@dataclass(frozen=True)
class Scored:
    """This rank's completions with what the reward functions said."""

    completions: Sequence[Completion]
    inputs: list[RewardInput]
    scores: np.ndarray  # [len(completions), K] float64, NaN where a function does not apply
    faults: np.ndarray  # [len(completions), K] 0, FAILED or LATE
    num_rows: int  # of the step, over all ranks


class Scoring:
    """Scores of a step's, or an evaluation's completions on this rank, asked for while others are still sampled.

    Where rewards take their time (`Rewards.early`) they get a completion as soon as `take` does, and a group once all
    of it is there; `pulse` moves their calls along, and `finish` waits for what is missing. What comes out does not
    depend on when completions were taken.
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
        """`report` gets a line for each of a function's first failures. num_generations: of a prompt; None: as in cfg.

        Raises UserError when a worker cannot be started.
        """
        self.rewards, self.prompts, self.tokenizer, self.report = rewards, prompts, tokenizer, report
        self.num_generations = num_generations or cfg.num_generations
        self.as_messages = cfg.reward_inputs == "messages"
        self.asked_to_stop = pulse
        self.stopped = False
        self.taken: dict[int, Completion] = {}  # by row, like the next two
        self.inputs: dict[int, RewardInput] = {}
        self.rows: dict[int, int] = {}  # in the order of arrival: what calls name
        self.parts: dict[int, list[int]] = {}  # rows of groups that are not whole yet
        self.places: dict[tuple[int, tuple[int, ...]], int] = {}  # (function, rows) -> place of the call
        rewards.begin()

    def pulse(self) -> bool:
        """For whoever samples, in place of the pulse that was given."""
        if not self._stop():
            self.rewards.advance()
        return self.stopped

    def take(self, completions: Sequence[Completion]) -> None:
        """Completions that are final, each once. After a request to stop they may be cut, and are left alone."""
        if self.rewards.early and not self.stopped:
            self._submit(completions)
            self.rewards.advance()

    def finish(self, completions: Sequence[Completion]) -> Scored:
        """What the rewards say of all completions, in the order in which they are given here.

        When the pulse says stop, what is not scored yet stays without a score, and counts as no failure.
        """
        for one in completions:
            same = one.row not in self.taken or np.array_equal(one.token_ids, self.taken[one.row].token_ids)
            assert same, "a completion that was taken is not the one that was returned"
        if not self.stopped:
            self._submit([one for one in completions if one.row not in self.taken], last=True)
        answers = self.rewards.collect(self._stop)
        inputs = [self.inputs.get(one.row) or self._input(one) for one in completions]
        place_of = {one.row: i for i, one in enumerate(completions)}
        whole: dict[int, list[int]] = {}
        for row in sorted(place_of):
            whole.setdefault(row // self.num_generations, []).append(row)
        scores = np.full((len(inputs), len(self.rewards.rewards)), NO_SCORE)
        faults = np.zeros_like(scores)
        for k, reward in enumerate(self.rewards.rewards):
            failures: list[Failure] = []
            for chosen in whole.values() if reward.sees_group else [[row] for row in place_of]:
                call = self.places.get((k, tuple(chosen)))
                answer = None if call is None else answers[call]
                for row, outcome in zip(chosen, answer.outcomes if answer else [], strict=answer is not None):
                    at = place_of[row]
                    if isinstance(outcome, str):
                        assert answer is not None
                        failures.append(Failure(reward.name, outcome, inputs[at], answer.timeout))
                        faults[at, k] = LATE if answer.timeout else FAILED
                    elif outcome is not None:
                        scores[at, k] = outcome
            for failure in failures[:REPORTED_FAILURES]:
                self.report(str(failure))
        return Scored(completions, inputs, scores, faults, len(self.prompts) * self.num_generations)

    def _stop(self) -> bool:
        self.stopped = self.asked_to_stop() or self.stopped
        return self.stopped

    def _submit(self, completions: Sequence[Completion], last: bool = False) -> None:
        """Have the calls made that these completions allow; last: groups that are not whole will not become so."""
        for one in completions:
            assert one.row not in self.taken, "a completion was given twice"
            self.rows[one.row] = len(self.rows)
            self.taken[one.row], self.inputs[one.row] = one, self._input(one)
            self.parts.setdefault(one.row // self.num_generations, []).append(one.row)
        ready = sorted(p for p, part in self.parts.items() if last or len(part) == self.num_generations)
        groups = [tuple(sorted(self.parts.pop(p))) for p in ready]
        singles = [(one.row,) for one in completions]
        calls = []
        for k, reward in enumerate(self.rewards.rewards):
            for chosen in groups if reward.sees_group else singles:
                self.places[k, chosen] = len(self.places)
                calls.append(Call(k, tuple(self.rows[row] for row in chosen)))
        self.rewards.submit([self.inputs[one.row] for one in completions], calls)

    def _input(self, completion: Completion) -> RewardInput:
        """A completion as rewards see it."""
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

    A row to which none applies takes no part in its group's statistics and gets advantage 0.

    >>> combine(np.array([[1.0, np.nan], [np.nan, np.nan]]), [0.5, 1.0]).tolist()
    [0.5, nan]
    """
    applies = ~np.isnan(scores)
    total = (np.where(applies, scores, 0.0) * np.asarray(weights)).sum(-1)
    return np.where(applies.any(-1), total, NO_SCORE)


def gather(
    world: World, cfg: Config, rewards: Sequence[Reward], scored: Scored, notices: Sequence[float] = ()
) -> Table:
    """Complete the table over ranks. Raises UserError, on every rank alike, when too many calls failed.

    notices: numbers of this rank's own that all ranks should see, such as a request to stop; a few at most.
    """
    names = [reward.name for reward in rewards]
    num_rows, K = scored.num_rows, len(rewards)

    # rows: scores, facts, faults of a completion; below them a line a rank with its notices
    table = np.zeros((num_rows + world.size, K + len(FACTS) + K))
    table[num_rows + world.rank, : len(notices)] = notices
    for completion, scores, faults in zip(scored.completions, scored.scores, scored.faults, strict=True):
        facts = _facts_of(completion, faults, world.rank)
        table[completion.row] = [*scores, *(facts[name] for name in FACTS), *faults]

    table, all_notices = np.split(world.sum_rows(table), [num_rows])
    all_scores, facts_table, all_faults = np.split(table, [K, K + len(FACTS)], axis=1)
    check_failures(cfg, all_faults, names)
    totals = combine(all_scores, [reward.weight for reward in rewards])
    columns = dict(zip(FACTS, facts_table.T, strict=True))
    return Table(names, all_scores, totals, columns, cfg.num_generations, all_notices, all_faults)


def _facts_of(completion: Completion, faults: np.ndarray, rank: int) -> dict[str, float]:
    """What every rank needs to know of a row, see FACTS."""
    return {
        "length": len(completion.token_ids),
        "trained": np.count_nonzero(completion.trained),
        "stopped": completion.finish == "stop",
        "broken": completion.finish == "error",
        "clamped": completion.clamped,
        "logprob_sum": completion.sampler_logprobs[completion.trained].sum(dtype=np.float64),
        "failures": np.count_nonzero(faults),
        "rank": rank,
    }


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
    scale = cfg.scale_rewards == "group" and cfg.weighting != "dr_grpo"
    return group_advantages(table.grouped, scale, cfg.advantage_clip).ravel()
