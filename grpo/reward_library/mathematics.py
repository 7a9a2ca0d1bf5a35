"""Equality of mathematical expressions by Math-Verify, an extra: `pip install math-verify`.

It parses texts into expressions and compares them by value. Its own time limits are switched off: they use SIGALRM,
which fails outside the main thread, and they turn a hang into a silent 0. A reward worker's deadline replaces them.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from grpo.reward_library.parameters import declare
from grpo.reward_library.scanning import inside
from grpo.rewards import completion_text


def need_math_verify(**parameters: Any) -> None:
    """Import it, in a worker before the first call's clock starts. Raises ValueError where it is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("it needs the package math-verify, which is not installed. Run: pip install math-verify.")
    import math_verify  # noqa: F401  slow to import, and not everybody's

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time limits are off


@lru_cache(maxsize=1024)
def parsed(text: str) -> tuple[Any, ...]:
    """What Math-Verify reads in a text: an expression and its text, or nothing."""
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=None))


def agrees(text: str, gold: str) -> bool:
    """Whether Math-Verify finds the text equal to the gold; False for anything it cannot read or compare."""
    from math_verify import verify

    try:
        return bool(verify(list(parsed(gold)), list(parsed(text)), timeout_seconds=None))
    except MemoryError:  # a worker's limit: a failure to report, not a wrong answer
        raise
    except Exception:  # parsers below raise a dozen kinds; to the rules of the recipe all mean "not equal"
        return False


def math_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, start: str = "<answer>", end: str = "</answer>",
    **columns: Any,
) -> list[float | None]:  # fmt: skip
    """1.0 when the text between the last `start` and the next `end` agrees with the gold as a whole, else 0.0.

    Without `start` 0.0; an empty `end` means up to the end of the text. Words agree when they are the same, numbers by
    value and unit, expressions as Math-Verify compares them (math_reading.py). None for a gold that cannot be read.
    """
    return [
        _score(inside(completion_text(c), start, end), str(gold)) for c, gold in zip(completions, answer, strict=True)
    ]


math_reward.reads_gold = True  # type: ignore[attr-defined]


def _score(text: str | None, gold: str) -> float | None:
    from grpo.reward_library.math_reading import equal, reading

    known = reading(gold)
    if known is None:
        return None
    return 1.0 if text is not None and equal(known, reading(text)) else 0.0


def _prepare(start: Any, end: Any) -> None:
    from grpo.reward_library.scanning import check_marks

    need_math_verify()
    check_marks(start, end)


declare(math_reward, _prepare)
