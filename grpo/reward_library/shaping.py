"""The form of a text, independent of its content: format over several lines, length, repetition, language.

Such a reward alone teaches only the form: give it a small weight beside a reward for the right answer.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from grpo.reward_library.parameters import check_choice, check_number, check_text, check_whole, declare
from grpo.rewards import completion_text

TAG = re.compile(r"</?[A-Za-z_]+>")
LATIN = ((0x41, 0x24F), (0x1E00, 0x1EFF))
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))
SCRIPTS = {  # language -> code points of its letters, first and last
    "en": LATIN,
    "zh": HAN,
    "ja": (*HAN, (0x3041, 0x30FF)),
    "ko": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "ru": ((0x400, 0x52F),),
    "ar": ((0x600, 0x6FF), (0x750, 0x77F)),
    "hi": ((0x900, 0x97F),),
    "el": ((0x370, 0x3FF),),
}


def multiline_format_reward(
    completions: Sequence[Any], *, thought: str = "think", solution: str = "answer", **columns: Any
) -> list[float]:
    """1.0 when the whole text is one thought and one solution, in tags of these names, else 0.0.

    Several lines each are fine, blanks around the tags too; neither may be empty, no tag may stand twice, nothing may
    stand outside.

    >>> multiline_format_reward(["<think>\\na\\nb\\n</think>\\n<answer>4</answer>", "<think>a</think>4"])
    [1.0, 0.0]
    """
    tags = [f"<{thought}>", f"</{thought}>", f"<{solution}>", f"</{solution}>"]
    return [1.0 if _is_in_order(completion_text(c).strip(), tags) else 0.0 for c in completions]


def _is_in_order(text: str, tags: list[str]) -> bool:
    if any(text.count(tag) != 1 for tag in tags) or not (text.startswith(tags[0]) and text.endswith(tags[3])):
        return False
    ends = [text.find(tag) for tag in tags]
    if ends != sorted(ends):
        return False
    first, between, last = (text[a + len(tag) : b].strip() for a, tag, b in zip(ends, tags, ends[1:]))
    return bool(first and last) and not between


def think_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the text begins with `<think>`, which stands once, and a `</think>` follows; any text may come after it.

    TRL's rule of this name. Empty thoughts and an empty answer pass.

    >>> think_format_reward(["<think>2+2</think> 4", " <think>2+2</think> 4", "<think>2+2"])
    [1.0, 0.0, 0.0]
    """
    texts = map(completion_text, completions)
    return [float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text) for text in texts]


def overlong_reward(
    completions: Sequence[Any], completion_ids: Sequence[Any], *, max_length: int = 256, buffer: int = 64,
    **columns: Any,
) -> list[float]:  # fmt: skip
    """0.0 up to max_length - buffer tokens, then falling evenly to -1.0 at max_length (DAPO, 2503.14476, eq. 13).

    >>> overlong_reward([""] * 3, [[0] * 192, [0] * 224, [0] * 256])
    [0.0, -0.5, -1.0]
    """
    return [-min(1.0, max(0.0, (len(ids) - (max_length - buffer)) / buffer)) + 0.0 for ids in completion_ids]


def length_reward(
    completions: Sequence[Any], completion_ids: Sequence[Any], *, target: int = 100, **columns: Any
) -> list[float]:
    """1.0 at `target` tokens, falling evenly to 0.0 at none and at twice as many.

    >>> length_reward([""] * 3, [[0] * 100, [0] * 150, [0] * 300])
    [1.0, 0.5, 0.0]
    """
    return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in completion_ids]


def repetition_reward(
    completions: Sequence[Any], completion_ids: Sequence[Any], *, length: int = 4, **columns: Any
) -> list[float]:
    """Minus the share of runs of `length` tokens that stood there before: 0.0 without repetition, towards -1.0.

    A text shorter than one run gets 0.0. After the repetition penalty of 2502.03373.

    >>> repetition_reward(["", ""], [[1, 2, 3, 4, 5], [7, 7, 7, 7, 7, 7]])
    [0.0, -0.6666666666666667]
    """
    scores = []
    for ids in completion_ids:
        runs = max(0, len(ids) - length + 1)
        different = len({tuple(ids[at : at + length]) for at in range(runs)})
        scores.append(different / runs - 1.0 if runs else 0.0)
    return scores


def language_reward(completions: Sequence[Any], *, language: str = "en", **columns: Any) -> list[float]:
    """Share of the letters that belong to the language's script, 0.0 without letters; tags do not count.

    Scripts, not languages: French passes for English. Formulas count as Latin, so a Chinese text with x stays below 1.

    >>> language_reward(["<think>two eggs</think>", "两个eggs"]), language_reward(["两个"], language="zh")
    ([1.0, 0.6666666666666666], [1.0])
    """
    spans = SCRIPTS[language]
    scores = []
    for completion in completions:
        letters = [ord(letter) for letter in TAG.sub("", completion_text(completion)) if letter.isalpha()]
        own = sum(any(first <= letter <= last for first, last in spans) for letter in letters)
        scores.append(own / len(letters) if letters else 0.0)
    return scores


def _check_format(thought: Any, solution: Any) -> None:
    check_text("thought", thought)
    check_text("solution", solution)
    if thought == solution:
        raise ValueError(f"thought and solution must be two names, got {thought!r} for both. Rename one.")


def _check_overlong(max_length: Any, buffer: Any) -> None:
    check_whole("max_length", max_length, 1)
    check_whole("buffer", buffer, 1, max_length)


def _check_length(target: Any) -> None:
    check_number("target", target, 0, math.inf, "above 0")


def _check_repetition(length: Any) -> None:
    check_whole("length", length, 1, 64)


def _check_language(language: Any) -> None:
    check_choice("language", language, sorted(SCRIPTS))


declare(multiline_format_reward, _check_format)
declare(overlong_reward, _check_overlong)
declare(length_reward, _check_length)
declare(repetition_reward, _check_repetition)
declare(language_reward, _check_language)
