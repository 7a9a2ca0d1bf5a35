"""Finding the answer in a text, in one pass."""

from typing import Any

from grpo.reward_library.parameters import check_text


def inside(text: str, start: str, end: str) -> str | None:
    """Text after the last `start`, up to the next `end`, stripped; None without `start`, or without its `end`.

    An empty `end` means up to the end of the text.

    >>> inside("<answer>1</answer> no: <answer> 2 </answer>", "<answer>", "</answer>"), inside("#### 3", "####", "")
    ('2', '3')
    >>> inside("<answer>2", "<answer>", "</answer>")
    """
    _, found, rest = text.rpartition(start)
    if not found:
        return None
    if not end:
        return rest.strip()
    body, closed, _ = rest.partition(end)
    return body.strip() if closed else None


def check_marks(start: Any, end: Any) -> None:
    """Refuse marks that mark nothing. Raises ValueError."""
    check_text("start", start)
    if end != "":
        check_text("end", end)
