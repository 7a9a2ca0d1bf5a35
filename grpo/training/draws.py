"""The groups that a step is trained on: which prompts it draws, in one round or several, and which groups it keeps.

    filter_groups keep       one round of P prompts; every group is trained on
    filter_groups drop       the same; groups that the filter refuses leave the loss and its denominators
    filter_groups resample   further rounds until P groups are kept, max_rounds at most (DAPO, arXiv 2503.14476, eq. 11)

`group_filter` names the filter. zero_variance refuses groups whose rewards are all equal: they have no advantage; a
function of the user's own may refuse others (user_table_functions.py). Prompts are taken in the order of the
run's stream; `Counters.drawn` is the next place, so a resumed run goes on there. After each round every rank has the
same table, takes the same decision and keeps the first P groups of the stream, never those that were finished first.
A further round draws as many prompts as are likely to be needed, by the share that was kept in this step so far.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from grpo.config.settings import Config, prompts_per_step
from grpo.data.questions import Questions
from grpo.rewards.logged import Logs
from grpo.runtime.distributed import World
from grpo.training.advantages import group_advantages
from grpo.training.difficulty import Difficulty
from grpo.training.metrics import Tally, declare
from grpo.training.policy import Policy
from grpo.training.scoring import Scored, advantages_of
from grpo.training.user_table_functions import check_advantages, load_group_filter
from grpo.types import Counters, Prompt, Table

GroupFilter = Callable[[Table], np.ndarray]
"""-> [P] bool, the groups to keep."""


def varied_groups(table: Table) -> np.ndarray:
    """[P] bool: groups whose rewards give an advantage to some row."""
    return (group_advantages(table.grouped) != 0).any(-1)


def filter_of(cfg: Config, world: World) -> GroupFilter:
    """The filter that `group_filter` names. Raises UserError."""
    return varied_groups if cfg.group_filter == "zero_variance" else load_group_filter(cfg, world)


class Stream:
    """The questions of a run in their order, those that rest left out."""

    def __init__(self, cfg: Config, questions: Questions, policy: Policy):
        """Make it before the policy's state is restored: the state of questions is a part of that."""
        self.cfg, self.questions, self.world = cfg, questions, policy.world
        self.difficulty: Difficulty | None = None
        if cfg.difficulty_range is not None:
            low, high = cfg.difficulty_range
            self.difficulty = Difficulty(len(questions.items), low, high, cfg.difficulty_rest)
            policy.extras["questions"] = self.difficulty
            declare(maxima=("questions/resting",))
        if cfg.filter_groups != "keep":
            declare(maxima=("groups/drawn", "groups/kept", "groups/rounds"))

    def slots(self, place: int, count: int) -> list[int]:
        """The next places of questions that do not rest, from `place` on."""
        if self.difficulty is None:
            return list(range(place, place + count))
        slots: list[int] = []
        passed, num_questions = 0, len(self.questions.items)  # passed over one after the other
        while len(slots) < count:
            [prompt] = self.questions.at([place])
            if passed < num_questions and self.difficulty.rests(prompt.data_row, place // num_questions):
                passed += 1
            else:
                slots.append(place)
                passed = 0
            place += 1
        return slots


class Draws:
    """The prompts of one step, and what was sampled for them; rows n = p*G + g count over all rounds."""

    def __init__(self, stream: Stream, drawn: int, keeps: GroupFilter | None = None):
        """drawn: the first place of the stream that is free. keeps: None: the filter that `group_filter` names."""
        self.cfg, self.stream, self.keeps = stream.cfg, stream, keeps or filter_of(stream.cfg, stream.world)
        self.drawn = drawn
        self.wanted = prompts_per_step(self.cfg)  # prompts to draw in the next round; 0: there is none
        self.rounds = 0
        self.prompts: list[Prompt] = []
        self.slots: list[int] = []  # of the prompts
        self.chosen: list[int] = []  # groups p to train on, at most P
        self.scored: Scored = None  # type: ignore[assignment]  # of this rank, rounds joined
        self.table: Table = None  # type: ignore[assignment]  # the same on every rank
        self.kl_penalty: np.ndarray | None = None  # [N] what each reward loses to the KL (kl_in_reward.py)

    def next_prompts(self) -> tuple[list[Prompt], list[int]]:
        """The prompts of the next round and their slots, places in the run's stream."""
        slots = self.stream.slots(self.drawn, self.wanted)
        self.slots, self.drawn = [*self.slots, *slots], slots[-1] + 1
        return self.stream.questions.at(slots), slots

    def following(self, step: int, total: int) -> tuple[list[Prompt], list[int]] | None:
        """Prompts and slots of `step`, counted from 0, where they are sampled one step ahead (rollout_ahead)."""
        if step == total or not self.cfg.rollout_ahead:
            return None
        slots = self.stream.slots(self.drawn, prompts_per_step(self.cfg))
        return self.stream.questions.at(slots), slots

    def add(self, prompts: list[Prompt], scored: Scored, table: Table) -> None:
        """Add what was sampled in a round, choose groups, and decide whether another round follows."""
        P, first = prompts_per_step(self.cfg), len(self.prompts)
        self.rounds += 1
        self.prompts += prompts
        self.scored = scored if self.rounds == 1 else joined_scores(self.scored, scored)
        self.table = table if self.rounds == 1 else joined_tables(self.table, table)
        kept = range(len(prompts)) if self.cfg.filter_groups == "keep" else np.flatnonzero(self.keeps(table)).tolist()
        self.chosen = [*self.chosen, *(first + p for p in kept)][:P]
        missing, share = P - len(self.chosen), len(self.chosen) / len(self.prompts)
        again = self.cfg.filter_groups == "resample" and missing and self.rounds < self.cfg.max_rounds
        self.wanted = min(P, math.ceil(missing / share) if share else P) if again else 0

    def advantages(self) -> np.ndarray:
        """[N] advantages from the chosen groups alone; 0 for the rows of others.

        The KL in the rewards is subtracted here: the filter of groups and the log see rewards without it.
        """
        table = self.table
        if self.kl_penalty is not None:
            table = replace(table, rewards=table.rewards - self.kl_penalty)
        advantages = np.zeros(table.grouped.shape)
        if self.chosen:
            of_chosen = advantages_of(groups_of(table, self.chosen), self.cfg)
            advantages[self.chosen] = of_chosen.reshape(len(self.chosen), -1)
        check_advantages(self.cfg, self.stream.world, advantages)
        return advantages.ravel()

    def finish(self, counters: Counters, tally: Tally) -> None:
        """The step is done: note it in the run's state, and record how many groups were drawn and kept."""
        counters.drawn = self.drawn
        difficulty, num_questions = self.stream.difficulty, len(self.stream.questions.items)
        if difficulty is not None:
            scores = self.table.scores[:, 0].reshape(len(self.prompts), -1)
            for prompt, slot, row in zip(self.prompts, self.slots, scores, strict=True):
                known = row[~np.isnan(row)]
                difficulty.note(prompt.data_row, slot // num_questions, known.mean() if len(known) else np.nan)
            tally.top("questions/resting", difficulty.share_resting(self.drawn // num_questions))
        if self.cfg.filter_groups != "keep":
            for name, value in (("drawn", len(self.prompts)), ("kept", len(self.chosen)), ("rounds", self.rounds)):
                tally.top(f"groups/{name}", value)


def joined_scores(first: Scored, second: Scored) -> Scored:
    """The completions of two rounds; the second one's rows follow those of the first."""
    offset = first.num_rows
    logs = Logs({**first.logs.columns}, {name: [*values] for name, values in first.logs.metrics.items()})
    logs.columns.update({row + offset: columns for row, columns in second.logs.columns.items()})
    for name, values in second.logs.metrics.items():
        logs.metrics.setdefault(name, []).extend(values)
    return Scored(
        [*first.completions, *(replace(one, row=one.row + offset) for one in second.completions)],
        [*first.inputs, *second.inputs],
        np.concatenate([first.scores, second.scores]),
        np.concatenate([first.faults, second.faults]),
        offset + second.num_rows,
        logs,
    )


def joined_tables(first: Table, second: Table) -> Table:
    """The rows of two rounds, with the notices of the second."""
    return replace(
        second,
        scores=np.concatenate([first.scores, second.scores]),
        rewards=np.concatenate([first.rewards, second.rewards]),
        faults=np.concatenate([first.faults, second.faults]),
        facts={name: np.concatenate([column, second.facts[name]]) for name, column in first.facts.items()},
    )


def groups_of(table: Table, groups: list[int]) -> Table:
    """The rows of these groups, p of each."""
    rows = np.arange(len(table.rewards)).reshape(-1, table.num_generations)[groups].ravel()
    return replace(
        table,
        scores=table.scores[rows],
        rewards=table.rewards[rows],
        faults=table.faults[rows],
        facts={name: column[rows] for name, column in table.facts.items()},
    )
