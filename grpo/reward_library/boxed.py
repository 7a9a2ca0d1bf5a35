"""Answers in LaTeX boxes, \\boxed{...}, compared as `math_reward` compares; and a reward that counts the length too."""

import math
import re
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.mathematics import math_reward, need_math_verify
from grpo.reward_library.numeric import last_number_reward, numeric_reward
from grpo.reward_library.parameters import check_choice, check_number, check_whole, declare
from grpo.rewards import completion_text

PART = re.compile(r"\\(?:boxed|fbox)\s?\{|\\.|[{}]", re.DOTALL)  # \{ is no brace
SPELLED = re.compile(
    r"(?<![a-z])(?:zero|one|two|three|five|eight|ten|eleven|twelve|(?:four|six|seven|nine)(?:teen)?|(?:thir|fif|eigh)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|billion)\.?\Z"
)
RULES = {"math": math_reward, "numeric": numeric_reward, "last_number": last_number_reward}  # and "boxed"


def boxed(text: str) -> str | None:
    """The content of the last box that is closed, braces inside it included; None without one.

    >>> boxed(r"\\boxed{1} so \\boxed{\\frac{63}{400}}, \\boxed{"), boxed("42")
    ('\\\\frac{63}{400}', None)
    """
    opened: list[int | None] = []  # of each open brace: where a box's content begins
    last = (-1, -1)
    for part in PART.finditer(text):
        if part[0] == "}":
            start = opened.pop() if opened else None
            last = max(last, (start, part.start())) if start is not None else last
        elif part[0][-1] == "{" and part[0] != "\\{":
            opened.append(part.end() if part[0] != "{" else None)
    return text[last[0] : last[1]] if last[0] >= 0 else None


def boxed_math_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, after: str = "", **columns: Any
) -> list[float | None]:
    """1.0 when the content of the last `\\boxed{...}` agrees with the gold, read as `math_reward` reads it, else 0.0.

    With `after`, such as `</think>`, only text behind its last occurrence counts; without it in the text 0.0. The gold
    is an answer, or a text that ends in a box. None for a gold that cannot be read, or that spells a number out.
    """
    texts = (_behind(completion_text(c), after) for c in completions)
    return [_score(boxed(text), str(gold)) for text, gold in zip(texts, answer, strict=True)]


boxed_math_reward.reads_gold = True  # type: ignore[attr-defined]


def _behind(text: str, mark: str) -> str:
    if not mark:
        return text
    _, found, rest = text.rpartition(mark)
    return rest if found else ""


def _score(answer: str | None, gold: str) -> float | None:
    from grpo.reward_library.math_reading import equal, reading

    inside_gold = boxed(gold)
    known = reading(gold if inside_gold is None else f"\\boxed{{{inside_gold}}}")
    if known is None or SPELLED.search(known.words):
        return None
    return 1.0 if answer is not None and equal(known, reading(f"\\boxed{{{answer}}}")) else 0.0


def cosine_length_reward(
    completions: Sequence[Any], answer: Sequence[Any], completion_ids: Sequence[Any], *, rule: str = "boxed",
    max_length: int = 256, min_value_wrong: float = -1.0, max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5, max_value_correct: float = 1.0, **columns: Any,
) -> list[float | None]:  # fmt: skip
    """A right answer gets more the shorter the text is, a wrong one less: along half a cosine (2502.03373).

        right: from max_value_correct at no token to min_value_correct at max_length tokens and beyond
        wrong: from min_value_wrong at no token to max_value_wrong at max_length tokens and beyond

    `rule` says what is right: boxed, math, numeric or last_number, the function of that name with its own defaults.
    None where that gives None.
    """
    judge = RULES.get(rule, boxed_math_reward)
    scores = []
    for verdict, ids in zip(judge(completions, answer), completion_ids, strict=True):
        share = (1.0 + math.cos(math.pi * min(1.0, len(ids) / max_length))) / 2  # 1 at no token, 0 at max_length
        at_none, at_end = (max_value_correct, min_value_correct) if verdict else (min_value_wrong, max_value_wrong)
        scores.append(None if verdict is None else at_end + (at_none - at_end) * share)
    return scores


cosine_length_reward.reads_gold = True  # type: ignore[attr-defined]


def _prepare_boxed(after: Any) -> None:
    need_math_verify()
    if not isinstance(after, str):
        raise ValueError(f"after must be text, or empty, got {after!r}. Change it in reward_parameters.")


def _prepare_cosine(rule: Any, max_length: Any, **values: Any) -> None:
    check_choice("rule", rule, ["boxed", *RULES])
    check_whole("max_length", max_length, 1)
    for name, value in values.items():
        check_number(name, value, -math.inf, math.inf, "of any sign")
    if rule in ("boxed", "math"):
        need_math_verify()


declare(boxed_math_reward, _prepare_boxed)
declare(cosine_length_reward, _prepare_cosine)
