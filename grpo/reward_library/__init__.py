"""Reward functions to choose from. reward_func.py offers all of them by name; docs/rewards.md says what each rewards.

In: completions as text, the gold answer and other data columns. Out: one number, or None, for each completion. A new
function goes into one of the files, its name into `__all__` below and a row into docs/rewards.md.

    think_answer      <think> and <answer>: two recipes for GSM8K, rule by rule
    reasoning_answer  <reasoning> and <answer>
    working_out       <end_working_out> and <SOLUTION>
    multiple_choice   a letter, and the refusal
    numeric           numbers as people write them, compared as fractions
    shaping           format over several lines, length, repetition, language
    structured        JSON objects
    mathematics       equality by Math-Verify (an extra: pip install math-verify)
    model             a sequence classifier as judge
    parameters        checks of what reward_parameters says

The rules of the recipes are kept to the letter, oddities included, so that a score means what it meant there; what
they get wrong is mended in functions of other names. Our own rules take time linear in the length of the text: they
look for fixed strings, or use patterns that never try one place twice.

A function names its parameters in `f.parameters`; they come from reward_parameters, never from a data column.
`f.prepare(**parameters)` runs once in each worker, before the first call: it checks them (ValueError says what is
wrong), loads what is slow to load, and may return text that belongs to the run's fingerprint.

Reward workers import this package: neither torch nor numpy at module level.
"""

from grpo.reward_library.mathematics import math_reward
from grpo.reward_library.model import model_reward
from grpo.reward_library.multiple_choice import multiple_choice_reward, refusal_reward
from grpo.reward_library.numeric import numeric_reward
from grpo.reward_library.reasoning_answer import (
    int_reward,
    reasoning_answer_total,
    reasoning_correctness_reward,
    soft_xml_reward,
    strict_xml_reward,
    xml_count_reward,
)
from grpo.reward_library.shaping import (
    language_reward,
    length_reward,
    multiline_format_reward,
    overlong_reward,
    repetition_reward,
)
from grpo.reward_library.structured import json_reward
from grpo.reward_library.think_answer import (
    accuracy_reward,
    correctness_reward,
    digit_reward,
    format_reward,
    hard_format_reward,
    mark_reward,
    math_correctness_reward,
    reasoning_steps_reward,
    soft_format_reward,
    strict_format_reward,
    tag_count_reward,
    think_answer_total,
    xmlcount_reward,
)
from grpo.reward_library.working_out import (
    check_answer,
    check_numbers,
    match_format_approximately,
    match_format_exactly,
)

__all__ = [
    "accuracy_reward",
    "check_answer",
    "check_numbers",
    "correctness_reward",
    "digit_reward",
    "format_reward",
    "hard_format_reward",
    "int_reward",
    "json_reward",
    "language_reward",
    "length_reward",
    "mark_reward",
    "match_format_approximately",
    "match_format_exactly",
    "math_correctness_reward",
    "math_reward",
    "model_reward",
    "multiline_format_reward",
    "multiple_choice_reward",
    "numeric_reward",
    "overlong_reward",
    "reasoning_answer_total",
    "reasoning_correctness_reward",
    "reasoning_steps_reward",
    "refusal_reward",
    "repetition_reward",
    "soft_format_reward",
    "soft_xml_reward",
    "strict_format_reward",
    "strict_xml_reward",
    "tag_count_reward",
    "think_answer_total",
    "xml_count_reward",
    "xmlcount_reward",
]
