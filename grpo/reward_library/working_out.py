"""<start_working_out> … <end_working_out><SOLUTION> … </SOLUTION>: four rules of a DAPO-Math recipe, exactly.

Together from -10 to 13. The start tag is part of the prompt, so no rule checks for it. In training special tokens are
removed before a text is scored, so `eos_token` only matters for texts from other sources.
"""

import re
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.parameters import check_text, declare
from grpo.rewards import completion_text

END, START_SOLUTION, END_SOLUTION = "<end_working_out>", "<SOLUTION>", "</SOLUTION>"
BLANKS = re.compile(r"\s*")
NUMBER = re.compile(r"-?[\d.,]+")


def solution(text: str, eos_token: str) -> str | None:
    """What the solution tags hold when the text ends a line after them, else None; not stripped.

    After `</SOLUTION>` only blanks, one `eos_token` and blanks again may follow up to the end of some line.

    >>> solution("so<end_working_out> <SOLUTION>4 </SOLUTION>\\nbye", "</s>")
    '4 '
    """
    start = text.find(END)
    start = text.find(START_SOLUTION, start + len(END)) if start >= 0 else start
    if start < 0:
        return None
    start += len(START_SOLUTION)
    end = text.find(END_SOLUTION, start + 1)  # the solution is one character at least
    while end >= 0 and not _ends_a_line(text, end + len(END_SOLUTION), eos_token):
        end = text.find(END_SOLUTION, end + 1)
    return text[start:end] if end >= 0 else None


def end_of_blanks(text: str, here: int) -> int:
    """The first place from `here` on that holds no blank."""
    found = BLANKS.match(text, here)
    assert found is not None  # it matches nothing as well
    return found.end()


def _ends_a_line(text: str, here: int, eos_token: str) -> bool:
    for _ in range(2):  # before and after the end-of-sequence token
        blank_to = end_of_blanks(text, here)
        if blank_to == len(text) or text.find("\n", here, blank_to) >= 0:
            return True
        if not text.startswith(eos_token, blank_to):
            return False
        here = blank_to + len(eos_token)
    return False


def match_format_exactly(
    completions: Sequence[Any], *, eos_token: str | Sequence[str] = "</s>", **columns: Any
) -> list[float]:
    """3.0 when the text has the format, see `solution`, else 0.0."""
    pairs = zip(completions, _each(eos_token, completions), strict=True)
    return [3.0 if solution(completion_text(c), eos) is not None else 0.0 for c, eos in pairs]


def match_format_approximately(completions: Sequence[Any], **columns: Any) -> list[float]:
    """For each of `<end_working_out>`, `<SOLUTION>` and `</SOLUTION>` 0.5 when it stands exactly once, else -1.0."""
    return [
        sum(0.5 if completion_text(c).count(tag) == 1 else -1.0 for tag in (END, START_SOLUTION, END_SOLUTION))
        for c in completions
    ]


def check_answer(
    completions: Sequence[Any], answer: Sequence[Any], *, eos_token: str | Sequence[str] = "</s>", **columns: Any
) -> list[float]:
    """The solution against the gold answer: 5.0 for equal text, 3.5 but for blanks around, else by the quotient.

    Within a tenth of the gold 2.0, within a fifth 1.5, further away -2.5; no numbers, or a gold of 0, -4.5. Without
    the format -2.0.
    """
    found = [solution(completion_text(c), eos) for c, eos in zip(completions, _each(eos_token, completions))]
    return [_compare(guess, str(gold)) for guess, gold in zip(found, answer, strict=True)]


def _compare(guess: str | None, gold: str) -> float:
    if guess is None:
        return -2.0
    if guess == gold:
        return 5.0
    if guess.strip() == gold.strip():
        return 3.5
    try:
        ratio = float(guess) / float(gold)
    except (ValueError, ZeroDivisionError):
        return -4.5
    return 2.0 if 0.9 <= ratio <= 1.1 else 1.5 if 0.8 <= ratio <= 1.2 else -2.5


def check_numbers(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """The first run of digits, dots and commas after the first `<SOLUTION>`, as a number, against the gold answer.

    Equal 3.5, different -1.5, not readable as numbers 0.0, none there -2.5. A minus counts when it touches the run;
    commas are taken out of the guess, not out of the gold.
    """
    pairs = zip(map(completion_text, completions), answer, strict=True)
    return [_compare_first_number(text, str(gold)) for text, gold in pairs]


def _compare_first_number(text: str, gold: str) -> float:
    start = text.find(START_SOLUTION)
    guess = NUMBER.search(text, start + len(START_SOLUTION)) if start >= 0 else None
    if guess is None:
        return -2.5
    try:
        return 3.5 if float(guess[0].replace(",", "")) == float(gold.strip()) else -1.5
    except ValueError:
        return 0.0


def _each(eos_token: str | Sequence[str], completions: Sequence[Any]) -> Sequence[str]:
    """One token for each completion: given once, or as a list like a column's."""
    return [eos_token] * len(completions) if isinstance(eos_token, str) else eos_token


def _check(eos_token: Any) -> None:
    check_text("eos_token", eos_token)


declare(match_format_exactly, _check)
declare(check_answer, _check)
