"""What `python -m grpo.evaluate` and inference.py share: argument types that check ranges, and the output file."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.evaluate.extract import is_marker


def checked(kind: type, name: str, allowed: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: the text as `kind`. It raises UserError for a value that does not fit.

    >>> checked(int, "limit", ">= 0", lambda value: value >= 0)("-1")
    Traceback (most recent call last):
    grpo.errors.UserError: limit: must be >= 0, got -1.
    """

    def convert(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise UserError(f"{name}: must be {allowed}, got {value!r}.")
        return value

    convert.__name__ = kind.__name__  # argparse names it when the text is not of that kind
    return convert


def whole(name: str, low: int, high: int | None = None) -> Callable[[str], Any]:
    """An argparse type: an integer from `low` to `high`. It raises UserError for a value outside."""
    allowed = f">= {low}" if high is None else f"{low} to {high}"
    return checked(int, name, allowed, lambda value: low <= value and (high is None or value <= high))


BATCH_ROWS = whole("batch_rows", 1, 4096)
MAX_NEW_TOKENS = whole("max_new_tokens", 1, 2**31 - 1)
SEED = whole("seed", 0, 2**63 - 1)
TEMPERATURE = checked(float, "temperature", "a finite number >= 0", lambda value: 0 <= value < math.inf)
TOP_P = checked(float, "top_p", "in (0, 1]", lambda value: 0 < value <= 1)
REFUSAL = checked(str, "refusal", "a text other than A to D", is_marker)


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `out` and rename it, so that `out` is never incomplete. Raises UserError."""
    beside = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, out)
    except OSError as error:
        refused = UserError(f"out: {out} cannot be written: {error}. Choose another --out.")
        refused.on_one_rank = True
        raise refused from None
