"""Reward functions to choose from. reward_func.py offers all of them by name; docs/rewards.md describes each.

In: completions as text, the gold answer and other data columns. Out: one number, or None, for each completion. To add
a function, write it in one of the files, and add its name to `__all__` below and a row to docs/rewards.md.

    think_answer      <think> and <answer>: two recipes for GSM8K, rule by rule
    reasoning_answer  <reasoning> and <answer>
    working_out       <end_working_out> and <SOLUTION>
    multiple_choice   a letter, and the refusal
    numeric           numbers in everyday notation, compared as fractions
    shaping           format over several lines, length, repetition, language
    boxed             \\boxed{...}, compared by Math-Verify; correctness and length in one
    structured        JSON objects
    mathematics       equality by Math-Verify (an extra: pip install math-verify)
    unit_tests        the share of unit tests that code passes: unit_test_cases are read from the data; the code runs in
                      solution_process, and unit_test_remotes stand for it in a test
    model             the score of a sequence classifier
    parameters        checks of the values in reward_parameters
    scanning          finding the text between two marks

The rules of the recipes are implemented exactly, oddities included, so that scores can be compared with those of the
recipe; functions of other names correct their mistakes. The project's own rules take time linear in the length of the
text: they look for fixed strings, or use patterns that never try one place twice.

A function names its parameters in `f.parameters`; they come from reward_parameters, never from a data column.
`f.prepare(**parameters)` runs once in each worker, before the first call: it checks them (and raises ValueError),
loads what is slow to load, and may return text that becomes part of the run's fingerprint.

Reward workers import this package, so its modules do not import torch or numpy at module level.
"""

from grpo.reward_library.boxed import boxed_math_reward, cosine_length_reward
from grpo.reward_library.mathematics import math_reward
from grpo.reward_library.model import model_reward
from grpo.reward_library.multiple_choice import multiple_choice_reward, refusal_reward
from grpo.reward_library.numeric import last_number_reward, numeric_reward
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
    think_format_reward,
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
from grpo.reward_library.unit_tests import unit_test_reward
from grpo.reward_library.working_out import (
    check_answer,
    check_numbers,
    match_format_approximately,
    match_format_exactly,
)

__all__ = [
    "accuracy_reward",
    "boxed_math_reward",
    "check_answer",
    "check_numbers",
    "correctness_reward",
    "cosine_length_reward",
    "digit_reward",
    "format_reward",
    "hard_format_reward",
    "int_reward",
    "json_reward",
    "language_reward",
    "last_number_reward",
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
    "think_format_reward",
    "unit_test_reward",
    "xml_count_reward",
    "xmlcount_reward",
]
