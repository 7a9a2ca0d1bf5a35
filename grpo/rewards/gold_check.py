"""Before training: how many gold answers a reward function cannot read.

A function with the mark `reads_gold` gives None exactly where the gold is unreadable, whatever the completion is. Such
a question has no reward from it, in every step, and nothing else would say so.
"""

from collections.abc import Sequence
from typing import Any

from grpo.config.settings import Config
from grpo.errors import UserError, warn
from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import Rewards, open_rewards

MAX_QUESTIONS = 2000  # looked at; expressions take milliseconds each
SHOWN = 3


def open_checked_rewards(cfg: Config, columns: Sequence[dict[str, Any]], is_main: bool) -> Rewards:
    """`open_rewards`; the main rank warns of golds that a function cannot read. columns: of each question.

    Raises UserError for a function that asks for a column that the data lack.
    """
    rewards = open_rewards(cfg, warn if is_main else lambda _: None)
    try:
        check_needed_columns(rewards.rewards, columns)
    except UserError:
        rewards.close()
        raise
    if is_main:
        warn_of_unreadable_golds(rewards, columns)
    return rewards


def check_needed_columns(rewards: Sequence[Reward], columns: Sequence[dict[str, Any]]) -> None:
    """Refuse a function with an argument that no column gives: every call would fail. Raises UserError."""
    known = {name for one in columns[:MAX_QUESTIONS] for name in one}
    for reward in rewards:
        lacking = [name for name in reward.needs if name not in known]
        if lacking and columns:
            way = "answer_column" if lacking[0] == "answer" else "column_names, or give the argument a default"
            raise UserError(
                f"rewards: {reward.name} asks for the column {lacking[0]!r}, which the data lack, only "
                f"{', '.join(sorted(known))[:200]}. Name it in {way}."
            )


def warn_of_unreadable_golds(rewards: Rewards, columns: Sequence[dict[str, Any]]) -> None:
    """One warning for each function that cannot read some golds. columns: of each question."""
    functions = [k for k, reward in enumerate(rewards.rewards) if reward.reads_gold]
    columns = columns[:MAX_QUESTIONS]
    if not functions or not columns:
        return
    inputs = [RewardInput("", "", [], one) for one in columns]
    rewards.begin()
    rewards.submit(inputs, [Call(k, (row,)) for k in functions for row in range(len(inputs))])
    answers = iter(rewards.collect(lambda: False))
    for k in functions:
        outcomes = [next(answers) for _ in inputs]
        unread = [row for row, one in enumerate(outcomes) if one is not None and one.outcomes == [None]]
        if unread:
            shown = ", ".join(repr(columns[row].get("answer"))[:60] for row in unread[:SHOWN])
            warn(
                f"warning: {rewards.rewards[k].name} cannot read {len(unread)} of {len(columns)} gold answers, such as "
                f"{shown}: their completions get no score from it."
            )
