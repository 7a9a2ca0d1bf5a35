"""Answers as JSON objects."""

import json
from collections.abc import Sequence
from typing import Any

from grpo.rewards import completion_text

MAX_LENGTH = 2**16  # characters


def json_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """0.2 for a JSON object, and 0.8 times the share of its keys and the gold's that both have with equal values.

    The object is the whole text, or all of it in one ``` fence. The gold is an object, or its JSON. 0.0 for what is no
    object: text around it, a key given twice, NaN. Values are equal when they are so as JSON: 1 and 1.0, not 1 and "1".

    >>> json_reward(['{"item": "pear", "count": 4}', '{"item": "pear"}', "4"], ['{"item": "pear", "count": 4}'] * 3)
    [1.0, 0.6, 0.0]
    """
    return [_score(completion_text(c), gold) for c, gold in zip(completions, answer, strict=True)]


def _score(text: str, gold: Any) -> float:
    found, wanted = read_object(text), gold if isinstance(gold, dict) else read_object(str(gold))
    if found is None:
        return 0.0
    if wanted is None:
        raise ValueError(f"the gold answer must be a JSON object, got {str(gold)[:60]!r}")
    keys = found.keys() | wanted.keys()
    right = sum(key in found and key in wanted and _equal(found[key], wanted[key]) for key in keys)
    return round(0.2 + 0.8 * (right / len(keys) if keys else 1.0), 12)


def _equal(a: Any, b: Any) -> bool:
    """As JSON values: true is no 1, at any depth."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, strictly read; None when it is none.

    >>> read_object('```json\\n{"a": [1]}\\n```'), read_object('{"a": 1, "a": 2}'), read_object("[1]")
    ({'a': [1]}, None, None)
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2][:-3]
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse) if len(text) <= MAX_LENGTH else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")
