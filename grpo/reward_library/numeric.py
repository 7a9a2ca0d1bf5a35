"""Numbers in everyday notation, compared as exact fractions: 1,450 = 1450.00, ½ = 0.5, −8 = -8, $73 = 73.

No text is evaluated and no value is rounded to a float: fixed patterns read digits from at most 100 characters.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo.reward_library.parameters import declare
from grpo.reward_library.scanning import check_marks, inside
from grpo.rewards import completion_text

MAX_LENGTH = 100  # characters; longer than any number in a task, and a bound on the work
MINUS = dict.fromkeys("−–‒﹣", "-")
SLASH = dict.fromkeys("⁄∕", "/")
AMOUNT = re.compile(
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*)(\.[0-9]+|\.(?![0-9]))?(?:[eE]([-+]?[0-9]{1,2})(?![0-9]))?"
)
FRACTION = re.compile(r"(?:([0-9]+) +)?([0-9]+) ?/ ?([0-9]+)")
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "十": 10,
    "百": 10**2,
    "千": 10**3,
    "万": 10**4,
    "萬": 10**4,
    "亿": 10**8,
    "億": 10**8,
}


def number(text: str) -> Fraction | None:
    """The one number that a text is, with a currency sign before or a unit after it; None for anything else.

    A percentage is its number: 50% reads as 50. Words of size count: 2 million. Powers (7²) and a second number
    (73 of 90, 73 or 74) make it unreadable.

    >>> [str(number(text)) for text in ("1,450", "73.0", "$73", "−8", "½", "2½", "７３", "146/2", "2e3", "73 km/h")]
    ['1450', '73', '73', '-8', '1/2', '5/2', '73', '73', '2000', '73']
    >>> [number(text) for text in ("", "seventy", "73 of 90", "7²", "1,45", "1/0", "1.2.3")]
    [None, None, None, None, None, None, None]
    """
    if len(text) > MAX_LENGTH:
        return None
    rest = _plain(text).strip().strip("*_` ").replace("\\", "")
    sign, rest = _sign(rest)
    rest = _without_currency(rest)
    second, rest = _sign(rest)
    value, rest = _amount(rest)
    if value is None or (sign and second):
        return None
    scale = _scale(rest.strip())
    return None if scale is None else (-value if "-" in (sign, second) else value) * scale


def _plain(text: str) -> str:
    """Digits of any script, full-width forms, signs and fractions in ASCII; other characters as they are."""
    return "".join(map(_plain_one, text))


def _plain_one(letter: str) -> str:
    if letter.isascii():
        return letter
    if letter.isspace():
        return " "
    if letter in MINUS or letter in SLASH:
        return MINUS.get(letter) or SLASH[letter]
    if "！" <= letter <= "～":
        return chr(ord(letter) - 0xFEE0)
    digit = unicodedata.decimal(letter, None)
    if digit is not None:
        return str(digit)
    made_of = unicodedata.decomposition(letter).split()
    if made_of[:1] == ["<fraction>"]:  # ½: a blank before it, so that 2½ is 2 1/2
        return " " + "".join(chr(int(code, 16)) for code in made_of[1:]).replace("⁄", "/")
    return letter


def _sign(text: str) -> tuple[str, str]:
    return (text[0], text[1:].lstrip()) if text[:1] in ("-", "+") else ("", text)


def _without_currency(text: str) -> str:
    """Without a currency sign in front, nor the up to three letters of US$ or NT$."""
    for here, letter in enumerate(text[:4]):
        if unicodedata.category(letter) == "Sc":
            return text[here + 1 :].lstrip()
        if not letter.isalpha():
            break
    return text


def _amount(text: str) -> tuple[Fraction | None, str]:
    """The value in front, without a sign, and what follows it."""
    found = FRACTION.match(text)
    if found:
        whole, top, bottom = (int(part or 0) for part in found.groups())
        return (whole + Fraction(top, bottom) if bottom else None), text[found.end() :]
    found = AMOUNT.match(text)
    assert found is not None  # it matches nothing as well
    whole_digits, decimals, exponent = found.groups()
    digits = whole_digits.replace(",", "") + (decimals or ".")
    if digits == ".":
        return None, text
    before, _, after = digits.partition(".")
    value = Fraction(int(before + after or 0), 10 ** len(after))
    return value * Fraction(10) ** int(exponent or 0), text[found.end() :]


def _scale(unit: str) -> int | None:
    """What a unit multiplies by, 1 for most; None for what is no unit."""
    if not all(letter.isalpha() or letter in " %‰°.'’/²³-" or unicodedata.category(letter) == "Sc" for letter in unit):
        return None
    if unit[:1] in ("/", "-", "²", "³"):
        return None
    word = unit.split(" ")[0].rstrip(".").lower()
    return SCALES.get(word) or SCALES.get(unit[:1]) or 1


def numeric_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, start: str = "<answer>", end: str = "</answer>",
    **columns: Any,
) -> list[float | None]:  # fmt: skip
    """1.0 when the text between the last `start` and the next `end` is a number equal to the gold, else 0.0.

    Without the marks 0.0; an empty `end` means up to the end of the text. None for a gold that is no number.

    >>> numeric_reward(["<answer>$1,450.00</answer>", "1450"], ["1450", "1450"])
    [1.0, 0.0]
    """
    texts = (inside(completion_text(c), start, end) for c in completions)
    return [_score(text, number(str(gold))) for text, gold in zip(texts, answer, strict=True)]


def _score(text: str | None, gold: Fraction | None) -> float | None:
    if gold is None:
        return None
    return 1.0 if text is not None and number(text) == gold else 0.0


numeric_reward.reads_gold = True  # type: ignore[attr-defined]
declare(numeric_reward, check_marks)

MENTIONED = re.compile(
    r"(?<![A-Za-z_0-9])(?<![0-9]\.)"
    r"(?:[0-9]+ ?/ ?[0-9]+"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])(?:[eE][-+]?[0-9]{1,2})?)"
)
NEGATIVE = re.compile(r"(?:\A|[^0-9A-Za-z)\]}])-[^\sA-Za-z0-9-]?\Z")  # a sign, and perhaps a currency sign, before it


def last_number(text: str) -> Fraction | None:
    """The last number among the last 400 characters up to the last digit; a digit behind a Latin letter is none (H2).

    >>> [str(last_number(text)) for text in ("3 x 4 = 12 eggs.", "#### 1,234", "-$5", "10-7", "is 3/4", "7 km2")]
    ['12', '1234', '-5', '7', '3/4', '7']
    """
    plain = _plain(text)
    end = 1 + max(map(plain.rfind, "0123456789"))
    window = plain[max(0, end - 4 * MAX_LENGTH) : end]
    found = [*MENTIONED.finditer(window)][-1:]
    value = number(found[0][0]) if found else None
    return value if value is None or not NEGATIVE.search(window[: found[0].start()]) else -value


def last_number_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 when the last number of the text equals the gold, else 0.0. None for a gold that is no number.

    It asks for no form, so a weak model gets a signal at once. It pays for the number alone: for one that is listed or
    guessed last, a unit or a step number that happens to be right, an answer without any work.

    >>> last_number_reward(["9 + 20 makes 29 coins.", "29, or 30"], ["29", "29"])
    [1.0, 0.0]
    """
    golds = [number(str(gold)) for gold in answer]
    texts = map(completion_text, completions)
    return [None if g is None else float(last_number(text) == g) for text, g in zip(texts, golds, strict=True)]


last_number_reward.reads_gold = True  # type: ignore[attr-defined]
declare(last_number_reward)
