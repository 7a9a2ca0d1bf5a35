"""Which questions are used: limits on lengths, and the part held out for evaluation.

Every rule counts the questions that it leaves out; `length_summary` in questions.py prints the counts at the start.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.types import Prompt

Drops = dict[str, int]  # why questions were left out -> how many


def quantile_limit(lengths: Sequence[int], share: float) -> int:
    """The longest length to keep: the quantile with linear interpolation, rounded down.

    >>> quantile_limit(range(10, 101, 10), 0.9), quantile_limit([5, 5, 5, 100], 0.9), quantile_limit([7], 0.9)
    (91, 71, 7)
    """
    return int(np.quantile(np.asarray(lengths), share))


def keep_short(
    items: Sequence[Prompt], answer_lengths: Sequence[int | None], cfg: Config, limits: bool
) -> tuple[list[Prompt], Drops]:
    """Leave out questions whose prompt or answer has too many tokens; no text is truncated.

    limits: False for a separate evaluation set, to which only max_prompt_length applies. The quantile is taken over
    all prompts, before any other limit. A question that several rules leave out is counted by the first of them.
    """
    rules: list[tuple[str, Callable[[int], bool]]] = []
    if limits and cfg.prompt_length_quantile < 1:
        limit = quantile_limit([len(item.token_ids) for item in items], cfg.prompt_length_quantile)
        quantile_rule = f"longer than the {cfg.prompt_length_quantile:g} quantile, {limit} tokens"
        rules.append((quantile_rule, lambda i: len(items[i].token_ids) > limit))
    rules.append(("too long", lambda i: len(items[i].token_ids) > cfg.max_prompt_length))
    if limits and cfg.max_answer_length is not None:
        max_answer = cfg.max_answer_length
        rules.append((f"answers longer than {max_answer} tokens", lambda i: (answer_lengths[i] or 0) > max_answer))
    drops: Drops = {reason: 0 for reason, _ in rules}
    short_items = []
    for i, item in enumerate(items):
        reason = next((reason for reason, applies in rules if applies(i)), None)
        if reason is None:
            short_items.append(item)
        else:
            drops[reason] += 1
    return short_items, drops


def question_text(item: Prompt) -> str:
    """The text that identifies a question; white space is normalized."""
    question = item.columns["question"]
    return " ".join(question.split()) if isinstance(question, str) else json.dumps(question, sort_keys=True)


def split(items: Sequence[Prompt], size: float, seed: int, source: str) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (to train on, held out). size: a share below 1, or a number of rows.

    A hash of seed and text orders the questions, and the first ones are held out until there are enough rows. So rows
    with the same question are in one part, and adding rows moves a question to the other part only if the number of
    held-out rows changes. Raises UserError when one of the parts would be empty.
    """
    num_wanted = round(size * len(items)) if size < 1 else int(size)
    texts = [question_text(item) for item in items]
    order = sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    rows_of: dict[str, int] = {}
    for text in texts:
        rows_of[text] = rows_of.get(text, 0) + 1
    held_out: set[str] = set()
    count = 0
    for text in order:
        if count >= num_wanted:
            break
        held_out.add(text)
        count += rows_of[text]
    if not 0 < count < len(items):
        raise UserError(
            f"eval_split_size: {size:g} of the {len(items)} questions of {source} leaves {len(items) - count} to train "
            f"on and {count} held out, and both need one. Choose another size, or 0."
        )
    trained = [item for item, text in zip(items, texts, strict=True) if text not in held_out]
    return trained, [item for item, text in zip(items, texts, strict=True) if text in held_out]


def check_unique(cells: Sequence[Any], source: str, column: str) -> None:
    """Refuse missing and repeated ids. Raises UserError naming file, rows and column."""
    seen: dict[str, int] = {}
    for row, cell in enumerate(cells):
        text = "" if cell is None else str(cell).strip()
        if not text:
            raise UserError(f"data: {source}, row {row + 1}, column {column!r}: the id is empty. Give every row one.")
        if text in seen:
            raise UserError(
                f"data: {source}, rows {seen[text] + 1} and {row + 1}, column {column!r}: both have the id "
                f"{text[:60]!r}. Mend or drop one, or see --id_column."
            )
        seen[text] = row
