"""<reasoning> and <answer>: the five rules of a GSM8K recipe, implemented exactly; together at most 3.999."""

import re
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.think_answer import tagged_answer
from grpo.rewards import completion_text

TAGS = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
MIDDLE = re.compile(r"</reasoning>\s*<answer>")


def reasoning_correctness_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """2.0 when the text after the last `<answer>` (without one: the whole text) is the gold answer, else 0.0."""
    texts = map(completion_text, completions)
    return [2.0 if tagged_answer(text) == str(gold) else 0.0 for text, gold in zip(texts, answer, strict=True)]


reasoning_correctness_reward.right = 2.0  # type: ignore[attr-defined]


def int_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when that text is made of digits alone (str.isdigit), else 0.0."""
    return [0.5 if tagged_answer(completion_text(c)).isdigit() else 0.0 for c in completions]


def strict_xml_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when the whole text is one line of reasoning and one of answer, tags on lines of their own, newline last."""
    return [0.5 if STRICT.match(completion_text(c)) else 0.0 for c in completions]


def soft_xml_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when `<reasoning>…</reasoning>`, blanks or none, `<answer>…</answer>` stand anywhere."""
    return [0.5 if _is_soft(completion_text(c)) else 0.0 for c in completions]


def _is_soft(text: str) -> bool:
    start = text.find("<reasoning>")
    middle = MIDDLE.search(text, start + len("<reasoning>")) if start >= 0 else None
    return middle is not None and text.find("</answer>", middle.end()) >= 0


def xml_count_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.125 for each tag that stands exactly once on a line of its own, less 0.001 for each character that trails.

    Trailing is what follows the last `</answer>` that starts a line; without one, the whole text.
    """
    return [_count(completion_text(c)) for c in completions]


def _count(text: str) -> float:
    score = 0.125 * sum(text.count(tag) == 1 for tag in TAGS)
    return score - 0.001 * len(text.rpartition("\n</answer>")[2])


def reasoning_answer_total(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """The sum of the five: at most 3.999."""
    parts = (
        reasoning_correctness_reward(completions, answer), int_reward(completions), strict_xml_reward(completions),
        soft_xml_reward(completions), xml_count_reward(completions),
    )  # fmt: skip
    return [sum(scores) for scores in zip(*parts, strict=True)]
