"""What a mathematical answer is: a text of words, a number with its unit, or an expression; and when two are equal.

`math_reward` compares readings. A text is read as a whole: one number out of several, or out of `x + 13`, is no answer.
Text between dollar signs, or in a box, is LaTeX. Elsewhere a word is a word and not the product of its letters, so a
text that mixes words and mathematics in any other way than as a number with its unit is not read; only words that lead
to the answer (`The answer is`, `Answer:`) are left out.

    kind         read from                                   equal when
    words        listen; \\text{Evelyn}; 2024-01-05            the same, whatever their case
    a number     1,450; $73; -8; 2 1/2; 50%; 5 km            the values are, and the units where both have one
    expression   2x+3; x = 5; [0,1); {1, 2}; 1, 2; \\frac12   Math-Verify finds them equal
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo.reward_library.numeric import MINUS, SCALES, _plain, number

MAX_LENGTH = 2000  # characters; longer than any answer
MATHS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
BETWEEN = re.compile(r"\s*(?:,|;|and|or|,\s*and|,\s*or)?\s*", re.IGNORECASE)
NAMES = re.findall(
    r"\w+",
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt min max gcd det lim alpha beta gamma "
    "delta epsilon theta lambda mu pi rho sigma tau phi omega infty infinity",
)
SIGNS = {"**": "^", "<=": "\\le ", ">=": "\\ge ", "!=": "\\ne ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne "}
SIGNS |= {"π": "\\pi ", "∞": "\\infty ", "×": "\\cdot ", "·": "\\cdot ", "*": "\\cdot ", "÷": "/", "²": "^2", "³": "^3"}
SIGNS |= MINUS
DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{4}")
MATHEMATICAL = re.compile(r"[\d=<>+*/^\\{}\[\]|π∞√≤≥≠×·÷∅∈]")
FORMULA = re.compile(r"[A-Za-z]+\d[A-Za-z\d]*")  # H2O: a word too
BEFORE = r"[^\d=<>+*/^\\{}\[\]|$]*?"  # words that lead to an answer
STATED = re.compile(BEFORE + r"\b(?:is|are|get|gets|equals|has|have)\b\s*(.*\d.*?)\.?", re.IGNORECASE | re.DOTALL)
LED_TO = re.compile(BEFORE + r"[:=]\s*([^:=]+?)\.?")
WORD = re.compile(r"[^\W\d_]+")
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
NUMBER = re.compile(
    r"([-+]? ?(?:[A-Z]{0,2}[$€£¥₹] ?)?[-+]?(?:(?:\d+ +)?\d+ ?/ ?\d+|(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?))(\D.*)?"
)
LATEX_OF_NUMBERS: list[tuple[str, Any]] = [
    (r"\{,\}|\\,|\\!|\\;", ""),
    (r"\\([%$])", r"\1"),
    (r"\^ ?\{? ?\\circ ?\}?|°", " degrees"),
    (r"(?<=[a-zA-Z])\^\{?([23])\}?$", lambda power: "²³"[int(power[1]) - 2]),
    (r"\\[dt]?frac ?(?:\{(\d+)\} ?\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4"),
]
UNIT = re.compile(r"(?:[^\W\d_]|[%‰$€£¥])(?:[^\W\d_]|[ .'’/²³-])*|")
ONE_LETTER_UNITS = set("mgshlLKCFNJWVA")
GLUED_UNITS = set(re.findall(r"\w+", "mm cm km mg kg ml mL dm ft in lb oz hr mi yd mph kph min sec th st nd rd"))
NO_UNITS = {
    "or",
    "and",
    "of",
    "to",
    "not",
    "than",
    "plus",
    "minus",
    "times",
    "is",
    "equals",
    "mod",
    "maybe",
    "if",
    "for",
}
SAME_UNITS = {"percent": "%", "°": "degree", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km"}
SAME_UNITS |= {"centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "gram": "g", "kilogram": "kg", "hour": "h"}
SAME_UNITS |= {"hr": "h", "minute": "min", "second": "s", "sec": "s", "feet": "ft", "foot": "ft", "inch": "in"}
SAME_UNITS |= {"litre": "l", "liter": "l", "dollar": "$", "cent": "¢", "pound": "lb", "mile": "mi", "inche": "in"}


@dataclass(frozen=True)
class Reading:
    """One answer; exactly one of words, value and parsed says which kind it is."""

    words: str = ""
    value: Fraction | None = None
    unit: str = ""
    parsed: tuple[Any, ...] = ()  # as Math-Verify gives it


@lru_cache(maxsize=1024)
def reading(text: str) -> Reading | None:
    """What a text says; None where it cannot be read as one answer. Words that lead to the answer are left out.

    >>> [reading(text) == reading("12") for text in ("It is 12.", "= 12", "It is 12 or 13", "It is not 12")]
    [True, True, False, False]
    """
    text = text[: MAX_LENGTH + 1].strip()
    if stated := STATED.fullmatch(text):
        return _whole(stated[1])
    whole = _whole(text)
    led_to = LED_TO.fullmatch(text) if whole is None else None
    return whole if led_to is None else _whole(led_to[1])


def _whole(text: str) -> Reading | None:
    if len(text) > MAX_LENGTH:
        return None
    text = _boxed(text.strip().strip("*_` ")).strip()
    found = list(MATHS.finditer(text))
    if found and all(re.search(r"[^\W_]", _inside(one)) for one in found) and not _is_currency(text, found):
        between = [text[a.end() : b.start()] for a, b in zip(found, found[1:], strict=False)]
        if not all(BETWEEN.fullmatch(one) for one in between) or re.search(r"\d", MATHS.sub("", text)):
            return None
        contents = [_inside(one).strip() for one in found]
        if len(contents) > 1:
            return _of_latex(", ".join(contents))
        return _read_number(f"{contents[0]} {text[found[0].end() :]}", glued=False) or _of_latex(contents[0])
    return _of_plain(text.rstrip(".。 "))


def equal(gold: Reading, answer: Reading | None) -> bool:
    """Whether an answer agrees with the gold; Math-Verify decides where one is an expression."""
    if answer is None or bool(gold.words) != bool(answer.words):
        return False
    if gold.words:
        return gold.words == answer.words
    if gold.value is not None and answer.value is not None:
        return _equal_numbers(gold, answer)
    from math_verify import verify

    try:
        return bool(verify(_expressions(gold), _expressions(answer), timeout_seconds=None))
    except MemoryError:  # a worker's limit: a failure to report, not a wrong answer
        raise
    except Exception:  # parsers below raise a dozen kinds; here all mean "not equal"
        return False


def _equal_numbers(gold: Reading, answer: Reading) -> bool:
    assert gold.value is not None and answer.value is not None
    if gold.value == answer.value and (gold.unit == answer.unit or not gold.unit or not answer.unit):
        return True
    shares = [(one.value / 100 if one.unit == "%" else one.value) for one in (gold, answer) if one.value is not None]
    return {gold.unit, answer.unit} == {"%", ""} and shares[0] == shares[1]


def _expressions(one: Reading) -> list[Any]:
    if one.value is None:
        return list(one.parsed)
    import sympy

    exact = sympy.Rational(one.value.numerator, one.value.denominator)
    return [exact] if exact.is_integer else [exact, sympy.Float(float(one.value))]  # 0.3, and 0.1 + 0.2


def _inside(match: re.Match[str]) -> str:
    return next(part for part in match.groups() if part is not None)


def _is_currency(text: str, found: list[re.Match[str]]) -> bool:
    """Whether dollar signs stand before amounts: $12 and $15."""
    return any(one[0][0] == "$" and re.fullmatch(r"[\d.,]+\s+[a-zA-Z,]+\s*", _inside(one)) is not None for one in found)


def _boxed(text: str) -> str:
    """The content of the last \\boxed{}, between dollar signs; the text itself without one."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return text
    start, depth = at + len("\\boxed{"), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            content = text[start:i].strip().strip("$")
            return f"${content}$"
    return text


def _of_plain(text: str) -> Reading | None:
    """A text without dollar signs: words, a number, or an expression whose words are names of functions."""
    number_read = _read_number(text, glued=True)
    if number_read is not None:
        return number_read
    if _is_text(text, letters=2) or FORMULA.fullmatch(text):
        return Reading(words=_words(text))
    latex = _as_latex(text)
    words = WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", re.sub(TEXT, " ", latex)))
    if any(len(word) > 2 or not word.isascii() for word in words) or re.search(r"\d\.\d+\.\d", text):
        return None
    return _of_latex(latex)


def _is_text(text: str, letters: int) -> bool:
    """Whether it is words only, or a date; one word has at least so many letters. Names of functions are no words."""
    words = WORD.findall(text)
    is_named = any(word.lower() in NAMES for word in words) and all(len(w) < 3 or w.lower() in NAMES for w in words)
    long = any(len(word) >= letters or not word.isascii() for word in words)
    return DATE.fullmatch(text) is not None or (long and not is_named and not MATHEMATICAL.search(text))


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _as_latex(text: str) -> str:
    """An expression in everyday signs as LaTeX."""
    text = re.sub(r"(?:(?<!\\)sqrt|√)\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)
    for sign, latex in SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub(rf"(?<![\\a-zA-Z])({'|'.join(NAMES)})(?![a-zA-Z])", r"\\\1 ", text).replace("\\infinity", "\\infty")
    text = re.sub(r"\s*(?:,\s*)?\b(?:or|and)\b\s*", ", ", text)
    return re.sub(r"\^(?:\(([^()]*)\)|(-?\d+))", r"^{\1\2}", text)


def _of_latex(latex: str) -> Reading | None:
    """An expression, or the words of \\text{}; four letters in a row are a word here too."""
    bare = re.sub(TEXT, r"\1", latex).strip()
    if _is_text(bare, letters=4 if bare == latex.strip() else 2):
        return Reading(words=_words(bare))
    latex = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?![^(\[{]*[)\]}])", "", latex)  # thousands, not coordinates
    parsed = parse_latex(latex)
    return Reading(parsed=parsed) if any(not isinstance(one, str) for one in parsed) else None


def parse_latex(latex: str) -> tuple[Any, ...]:
    """All of a LaTeX formula as Math-Verify reads it: the expression and its text; only the text where it cannot.

    Units were read before: here m is a variable. An equation of two different numbers, 10 = 12, says nothing.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = LatexExtractionConfig(normalization_config=cleaning)
    try:
        parsed = tuple(parse(f"${latex}$", extraction_config=[config], parsing_timeout=None))
        numeric = [one for one in parsed if getattr(one, "is_Relational", False) and not one.free_symbols]
        return () if any(bool(one.doit()) is False for one in numeric) else parsed
    except MemoryError:
        raise
    except Exception:  # parsers below raise a dozen kinds
        return ()


def _read_number(text: str, glued: bool) -> Reading | None:
    """A number with its unit, currency or percent sign. glued: 5km is a number; else it is 5 times k times m."""
    in_units = re.sub(TEXT, r" \1", text)
    for latex, plain in LATEX_OF_NUMBERS:
        in_units = re.sub(latex, plain, in_units)
    found = NUMBER.fullmatch(_plain(in_units).strip())
    value = number(found[1]) if found else None
    if found is None or value is None or DATE.fullmatch(text):
        return None
    rest = found[2] or ""
    scale, unit = _unit(rest.strip(), apart=rest[:1].isspace(), glued=glued)
    return None if unit is None else Reading(value=value * scale, unit=unit)


def _unit(text: str, apart: bool, glued: bool) -> tuple[int, str | None]:
    """The word of size before a unit, as a factor, and one spelling of the unit; None for what is none."""
    words = text.split()
    if not words:
        return 1, ""
    first = words[0].rstrip(".")
    variable = first.isascii() and first.isalpha() and not (glued and (first in GLUED_UNITS or len(first) > 3))
    if (not apart and variable) or (apart and len(first) == 1 and variable and first not in ONE_LETTER_UNITS):
        return 1, None
    scale = SCALES.get(first.lower()) or SCALES.get(first[:1])
    if scale is not None:
        words = words[1:] if first.lower() in SCALES else [first[1:], *words[1:]]
    unit = " ".join(words).strip()
    if not UNIT.fullmatch(unit) or len(words) > 4 or any(word.lower().strip(".,") in NO_UNITS for word in words):
        return 1, None
    one = [word.rstrip(".") if len(word) < 4 else word.rstrip(".").lower().removesuffix("s") for word in words]
    return scale or 1, " ".join(SAME_UNITS.get(word, word) for word in one)
