"""Multiple choice: the rule of the recipe, and one in which refusing pays when the model is unsure.

With refusal a right letter scores 1, the refusal marker r, everything else 0. A model that is right with probability P
gets P on average for answering, so refusing pays exactly when P < r. Blind guessing is right once in `options`, so r
must exceed 1/options: at or below that, refusing would never pay, and the setting is rejected.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.parameters import check_number, check_text, check_whole, declare
from grpo.rewards import completion_text

REASONING, REASONING_END = re.compile("<reasoning>", re.I), re.compile("</reasoning>", re.I)
LETTER = re.compile(r"<answer>\s*([A-D])\s*</answer>", re.I)
ANSWER, ANSWER_END = re.compile("<answer>", re.I), re.compile("</answer>", re.I)


def multiple_choice_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, min_reasoning: int = 100, **columns: Any
) -> list[float]:
    """1.0 when the reasoning has `min_reasoning` characters and the letter is the gold's, else 0.0.

    Reasoning: what the first `<reasoning>…</reasoning>` holds, stripped. Letter: the first `<answer>` that holds one of
    A to D alone. Tags and letter in any case; of the gold the first letter counts.
    """
    pairs = zip(map(_text, completions), answer, strict=True)
    return [1.0 if _is_right(text, str(gold), min_reasoning) else 0.0 for text, gold in pairs]


def _is_right(text: str, gold: str, min_reasoning: int) -> bool:
    letter = LETTER.search(text)
    said = letter[1].upper() if letter else ""
    return _reasons(text, min_reasoning) and said == gold.strip().upper()[:1]


def _reasons(text: str, min_reasoning: int) -> bool:
    opened = REASONING.search(text)
    closed = REASONING_END.search(text, opened.end()) if opened else None
    return bool(opened and closed) and len(text[opened.end() : closed.start()].strip()) >= min_reasoning  # type: ignore[union-attr]


def _text(completion: Any) -> str:
    """Text of a completion in any of the containers that the recipe takes; what is none of them counts as empty."""
    if isinstance(completion, str):
        return completion
    message = completion[0] if isinstance(completion, list) and completion else completion
    return str(message.get("content", "")) if isinstance(message, dict) else ""


def refusal_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, refuse: float = 0.4, options: int = 4, marker: str = "?",
    min_reasoning: int = 0, **columns: Any,
) -> list[float]:  # fmt: skip
    """1.0 for the gold's letter, `refuse` for the refusal `marker`, 0.0 for another letter or anything else.

    The answer is what the one `<answer>…</answer>` of the text holds; two of them are no answer. A letter may be
    lower case, full width, in brackets or end in a dot. With `min_reasoning` both need so many characters of reasoning.

    >>> refusal_reward([f"<answer>{x}</answer>" for x in ("B", "(b)", "?", "A")], ["B"] * 4)
    [1.0, 1.0, 0.4, 0.0]
    """
    letters = [chr(ord("A") + i) for i in range(options)]
    wanted = _bare(marker)
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion_text(completion)
        said = _only_answer(text) if min_reasoning <= 0 or _reasons(text, min_reasoning) else None
        if said is not None and said == wanted:
            scores.append(refuse)
        else:
            letter = (said or "").strip("().。、 ")
            scores.append(1.0 if letter in letters and letter == _bare(str(gold))[:1] else 0.0)
    return scores


def _only_answer(text: str) -> str | None:
    """What the only `<answer>` holds, see `_bare`; None when there are none, or two."""
    opened = ANSWER.search(text)
    closed = ANSWER_END.search(text, opened.end()) if opened else None
    if opened is None or closed is None or ANSWER.search(text, opened.end()):
        return None
    body = text[opened.end() : closed.start()]
    return _bare(body) if len(body) <= 200 else None


def _bare(text: str) -> str:
    """Upper case, full width made plain, stripped."""
    return unicodedata.normalize("NFKC", text).strip().upper()


def _check_multiple_choice(min_reasoning: Any) -> None:
    check_whole("min_reasoning", min_reasoning, 0)


def _check_refusal(refuse: Any, options: Any, marker: Any, min_reasoning: Any) -> None:
    check_whole("options", options, 2, 26)
    check_whole("min_reasoning", min_reasoning, 0)
    check_text("marker", marker)
    check_number(
        "refuse",
        refuse,
        1 / options,
        1.0,
        f"above 1/options = {1 / options:g}, else guessing always pays at least as much as refusing, and below 1",
    )
    if _bare(marker).strip("().。、 ") in [chr(ord("A") + i) for i in range(options)]:
        raise ValueError(f"marker must be none of the options' letters, got {marker!r}. Take '?'.")


declare(multiple_choice_reward, _check_multiple_choice)
declare(refusal_reward, _check_refusal)
