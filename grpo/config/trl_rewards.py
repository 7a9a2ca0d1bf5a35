"""Reward functions of TRL and open-r1 by name, and ours where the rule is the same."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reward:
    """What stands here for a reward function of theirs."""

    names: str  # theirs, separated by blanks
    here: str = ""  # ours; empty: none has that rule
    parameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)  # our parameter -> the option of theirs that sets it
    reads_gold: bool = False  # from their column `solution`
    note: str = ""

    def advice(self) -> str:
        """What to use here, in a sentence.

        >>> BY_NAME["reasoning_accuracy_reward"].advice()
        'Use boxed_math_reward, with the parameters {"after": "</think>"}.'
        """
        if not self.here:
            return f"There is none with its rule here. {self.note}"
        given = f", with the parameters {json.dumps(self.parameters)}" if self.parameters else ""
        return f"Use {self.here}{given}."


COSINE = {name: f"cosine_{name}" for name in ("min_value_wrong", "max_value_wrong", "min_value_correct")}
COSINE |= {"max_value_correct": "cosine_max_value_correct", "max_length": "cosine_max_len"}
COSINE_DEFAULTS = {"min_value_wrong": 0.0, "max_value_wrong": -0.5, "min_value_correct": 0.5}  # open-r1's
COSINE_DEFAULTS |= {"max_value_correct": 1.0, "max_length": 1000}

REWARDS = (
    Reward("accuracy_reward accuracy", "boxed_math_reward", reads_gold=True, note="accuracy_reward is another rule "
           "here: it wants <answer> on a line of its own."),
    Reward("reasoning_accuracy_reward", "boxed_math_reward", {"after": "</think>"}, reads_gold=True),
    Reward("think_format_reward", "think_format_reward"),
    Reward("format_reward format", "format_reward"),
    Reward("tag_count_reward tag_count", "tag_count_reward"),
    Reward("reasoning_steps_reward reasoning_steps", "reasoning_steps_reward"),
    Reward("get_soft_overlong_punishment", "overlong_reward", {"max_length": 1280, "buffer": 256}),
    Reward("soft_overlong_punishment_reward soft_overlong_punishment", "overlong_reward",
           {"max_length": 16384, "buffer": 4096}, {"max_length": "max_completion_len", "buffer": "soft_punish_cache"}),
    Reward("get_cosine_scaled_reward cosine_scaled_reward cosine", "cosine_length_reward",
           COSINE_DEFAULTS, COSINE, True, "open-r1 counts characters, TRL and this one tokens."),
    Reward("get_repetition_penalty_reward repetition_penalty_reward repetition_penalty", "repetition_reward",
           {"length": 3}, {"length": "repetition_n_grams"}, note="Runs of words in open-r1, of tokens in TRL and here; "
           "the largest penalty is the weight."),
    Reward("code_reward code", "unit_test_reward", {"column": "verification_info"}, note="All lines are compared; "
           "there the shorter output ends the comparison."),
    Reward("binary_code_reward binary_code", note="unit_test_reward gives the share of tests passed."),
    Reward("ioi_code_reward ioi_code cf_code_reward cf_code codeforces", note="It asks a judge; unit_test_reward runs "
           "Python on this machine."),
    Reward("len_reward length", note="It compares the group: length_reward here is another rule. Write one with "
           "sees_group (docs/rewards.md)."),
    Reward("code_format_reward code_format", note="format_reward does not look for a code block."),
)  # fmt: skip
BY_NAME = {name: reward for reward in REWARDS for name in reward.names.split()}
OPEN_R1_DEFAULT = ("accuracy", "format", "tag_count")  # where a recipe of open-r1 names none


def markdown_table() -> str:
    """The table of rewards in docs/from_trl.md. Written by `python -m grpo.config --trl_names`."""
    lines = ["| TRL, open-r1 | here | note |", "| --- | --- | --- |"]
    for one in REWARDS:
        given = ", ".join(f"{name}: {value!r}".replace("'", '"') for name, value in one.parameters.items())
        ours = f"`{one.here}`" + (f" with `{{{given}}}`" if given else "") if one.here else "-"
        lines.append(f"| {', '.join(f'`{name}`' for name in one.names.split())} | {ours} | {one.note} |")
    return "\n".join(lines)
