"""Gold answers: from the cell of a column to the text that rewards compare with.

`answer_format` is how a cell is read: text (unchanged), hash (after the last ####), letter (A to D), number, json (an
object).
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.strict_json import parse_json

LETTERS = "ABCD"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)


def hash_answer(text: str) -> str | None:
    """GSM8K's gold answer: what follows the last ####.

    >>> hash_answer("2+2=4\\n#### 1,000 ")
    '1,000'
    >>> hash_answer("four") is None
    True
    """
    _, marker, gold = text.rpartition("####")
    return gold.strip() if marker else None


def letter_answer(text: str) -> str | None:
    """The gold letter of a multiple choice: the first character, as a capital; None when it is not A to D.

    >>> letter_answer(" b. 7"), letter_answer("E"), letter_answer("")
    ('B', None, None)
    """
    letter = text.strip()[:1].upper()
    return letter if letter and letter in LETTERS else None


def number_answer(text: str) -> str | None:
    """The text when it is a plain decimal number, else None.

    >>> number_answer(" -3.50 "), number_answer("1e-2"), number_answer("1,450"), number_answer("x+1")
    ('-3.50', '1e-2', None, None)
    """
    return text.strip() if NUMBER.fullmatch(text.strip()) else None


def json_answer(text: str) -> str | None:
    """The text when it is a JSON object, strictly read, else None.

    >>> json_answer('{"a": 1}'), json_answer("[1]"), json_answer('{"a": 1, "a": 2}')
    ('{"a": 1}', None, None)
    """
    try:
        return text if isinstance(parse_json(text.encode()), dict) else None
    except ValueError:
        return None


READERS: dict[str, tuple[Callable[[str], str | None], str]] = {  # reads a cell; the expected content, in words
    "text": (str, "a gold answer"),
    "hash": (hash_answer, "text with '#### answer'"),
    "letter": (letter_answer, "a letter, A to D"),
    "number": (number_answer, "a number"),
    "json": (json_answer, "a JSON object, as text"),
}


def _as_text(cell: Any, answer_format: str) -> str:
    """A cell as text; empty where it cannot be a gold answer."""
    if answer_format == "json" and isinstance(cell, dict):  # an object that was not written as text
        return json.dumps(cell, ensure_ascii=False, separators=(",", ":"))
    unusable = isinstance(cell, (dict, list, bytes)) or (isinstance(cell, float) and not math.isfinite(cell))
    return "" if cell is None or unusable else str(cell)


def gold_answers(cells: Sequence[Any], answer_format: str, source: str, column: str) -> list[str | None]:
    """Gold answers of a column as text; None for a row to leave out, whose cell holds text but no number.

    Such rows are common in collections of problems, so `number` drops and counts them. Any other row without an answer
    raises UserError naming the first one, and how many there are.
    """
    read, expected = READERS[answer_format]
    golds: list[str | None] = []
    bad: list[int] = []
    for row, cell in enumerate(cells):
        text = _as_text(cell, answer_format)
        gold = read(text) if text.strip() else None
        if not (gold and gold.strip()):
            gold = None
            if answer_format != "number" or not text.strip():
                bad.append(row)
        golds.append(gold)
    if bad:
        others = f" ({len(bad)} rows are like it)" if len(bad) > 1 else ""
        raise UserError(
            f"data: {source}, row {bad[0] + 1}, column {column!r}: expected {expected}, got "
            f"{str(cells[bad[0]])[:60]!r}{others}. Mend or drop the row, or see --answer_format."
        )
    return golds
