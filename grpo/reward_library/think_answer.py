"""<think> and <answer>: the rules of two GSM8K recipes, implemented exactly.

The Chinese recipe: correctness, digit, hard_format and mark, together at most 3.5. The English one: format, tag_count
and accuracy, weighted 0.5, 0.5, 1; its second set, for message lists: xmlcount, soft_format, strict_format,
math_correctness and int. docs/rewards.md describes how each can be hacked.
"""

import re
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.mathematics import agrees, need_math_verify
from grpo.reward_library.parameters import declare
from grpo.rewards import completion_text


def tagged_answer(text: str) -> str:
    """Text after the last `<answer>`, up to the next `</answer>`; without tags, the whole text. Stripped.

    >>> tagged_answer("<answer>1</answer> no: <answer> 2 </answer>")
    '2'
    """
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


# --- the Chinese recipe


def correctness_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """2.0 when the tagged answer is the gold answer, character for character, else 0.0."""
    texts = map(completion_text, completions)
    return [2.0 if tagged_answer(text) == str(gold) else 0.0 for text, gold in zip(texts, answer, strict=True)]


correctness_reward.right = 2.0  # type: ignore[attr-defined]


def digit_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when the tagged answer is made of digits alone (str.isdigit), else 0.0."""
    return [0.5 if tagged_answer(completion_text(c)).isdigit() else 0.0 for c in completions]


HARD_FORMAT = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>\n$")


def hard_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when the whole text is one line of thought and one line of answer, each tag on its own line.

    The text ends in a newline after `</answer>`; thoughts of several lines score 0.0.
    """
    return [0.5 if HARD_FORMAT.match(completion_text(c)) else 0.0 for c in completions]


MARKS = ("<think>\n", "</think>\n", "<answer>\n", "</answer>\n")


def mark_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.125 for each tag that stands exactly once and is followed by a newline."""
    return [0.125 * sum(completion_text(c).count(mark) == 1 for mark in MARKS) for c in completions]


# --- the English recipe

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
MIDDLE, END = "\n</think>\n<answer>\n", "\n</answer>"


def _after_middle(text: str) -> int:
    """Where the answer of a text in format begins; -1 when it does not open so."""
    if not text.startswith("<think>\n"):
        return -1
    middle = text.find(MIDDLE, len("<think>\n"))
    return middle if middle < 0 else middle + len(MIDDLE)


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the text begins with thought and answer, each tag on its own line; several lines each are fine.

    Some `</answer>` must end a line; what follows on later lines does not count.
    """
    return [1.0 if _in_format(completion_text(c)) else 0.0 for c in completions]


def _in_format(text: str) -> bool:
    start = _after_middle(text)
    return start >= 0 and (text.find(f"{END}\n", start) >= 0 or text.endswith(END, start))


def strict_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 as format_reward, but the line of `</answer>` must be the last one, or an empty one must follow."""
    return [0.5 if _in_strict_format(completion_text(c)) else 0.0 for c in completions]


def _in_strict_format(text: str) -> bool:
    start = _after_middle(text)
    return start >= 0 and (text.find(f"{END}\n\n", start) >= 0 or text.endswith(f"{END}\n", start))


SOFT_MIDDLE = re.compile(r"</think>\s*<answer>")


def soft_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.5 when the text begins with `<think>…</think>`, blanks or none, `<answer>…</answer>`; anything may follow."""
    return [0.5 if _in_soft_format(completion_text(c)) else 0.0 for c in completions]


def _in_soft_format(text: str) -> bool:
    middle = SOFT_MIDDLE.search(text, len("<think>")) if text.startswith("<think>") else None
    return middle is not None and text.find("</answer>", middle.end()) >= 0


def tag_count_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.25 for each tag that stands exactly once on a line of its own."""
    return [0.25 * sum(completion_text(c).count(tag) == 1 for tag in TAGS) for c in completions]


def xmlcount_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0.125 for each tag that stands exactly once on a line of its own."""
    return [0.125 * sum(completion_text(c).count(tag) == 1 for tag in TAGS) for c in completions]


STEPS = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")


def reasoning_steps_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A third for each sign of a step, 1.0 at most.

    Signs: `Step 2:`, a number and a dot at the very start of the text, a line that starts with `-` or `*`, `First,`
    `Second,` `Next,` `Finally,`.
    """
    return [min(1.0, sum(1 for _ in STEPS.finditer(completion_text(c))) / 3) for c in completions]


def accuracy_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when Math-Verify finds the first `<answer>`, its tags on lines of their own, equal to the gold; else 0.0."""
    texts = map(completion_text, completions)
    return [1.0 if _is_accurate(text, str(gold)) else 0.0 for text, gold in zip(texts, answer, strict=True)]


def _is_accurate(text: str, gold: str) -> bool:
    _, found, rest = text.partition("<answer>\n")
    body, closed, _ = rest.partition(END)
    return bool(found and closed) and agrees(body.strip(), gold)


def math_correctness_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """2.0 when Math-Verify finds the tagged answer (without tags: the whole text) equal to the gold; else 0.0."""
    texts = map(completion_text, completions)
    return [2.0 if agrees(tagged_answer(text), str(gold)) else 0.0 for text, gold in zip(texts, answer, strict=True)]


math_correctness_reward.right = 2.0  # type: ignore[attr-defined]


def think_answer_total(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """Half of format_reward, half of tag_count_reward, and accuracy_reward: at most 2.0."""
    parts = (format_reward(completions), tag_count_reward(completions), accuracy_reward(completions, answer))
    return [0.5 * shape + 0.5 * tags + right for shape, tags, right in zip(*parts, strict=True)]


declare(accuracy_reward, need_math_verify)
declare(math_correctness_reward, need_math_verify)
declare(think_answer_total, need_math_verify)
