"""Strict reading of JSON of unknown origin: bounded size and depth, no duplicate keys, no NaN.

Imports neither torch nor transformers.
"""

import json
import math
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**24  # settings, indices, manifests: kilobytes in practice


def parse_json(text: str | bytes, infinity: bool = False) -> Any:
    """Parse standard JSON: no NaN, no duplicate keys, no number outside a float's range, bounded depth.

    infinity: accept Infinity, which some models' configs hold. Raises ValueError.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' occurs twice
    """

    def constant(word: str) -> float:
        if infinity and word != "NaN":
            return float(word)
        raise ValueError(f"{word} is not a JSON number")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(digits if not infinity else "Infinity")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {repeated[:60]!r} occurs twice")
        return members

    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            parse_constant=constant,
            parse_float=number,
            object_pairs_hook=unique,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_regular(path: Path, limit: int | None = None) -> int:
    """Size in bytes of a regular file; links are followed.

    Raises OSError when the file is missing, ValueError when it is not a regular file or is larger than the limit.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if limit is not None and status.st_size > limit:
        raise ValueError(f"it has {status.st_size} bytes, more than {limit}")
    return status.st_size


def read_json(path: Path, limit: int = MAX_JSON_BYTES, infinity: bool = False) -> Any:
    """Read a JSON file strictly. Raises OSError or ValueError."""
    check_regular(path, limit)
    return parse_json(path.read_bytes(), infinity)


def read_object(path: Path, infinity: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises OSError or ValueError."""
    value = read_json(path, infinity=infinity)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value
