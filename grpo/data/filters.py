"""Which questions are used: limits on lengths and on their number, and the part held out for evaluation.

Every rule counts what it leaves out; `length_summary` in grpo/data/questions.py says so at the start.
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
    """Leave out prompts and answers over their limits, in tokens; nothing is ever cut.

    limits: False for held-out data of its own, to which max_prompt_length alone applies. The quantile is that of all
    prompts, before any other limit. A question that several rules leave out is counted by the first of them.
    """
    rules: list[tuple[str, Callable[[int], bool]]] = []
    if limits and cfg.prompt_length_quantile < 1:
        limit = quantile_limit([len(item.token_ids) for item in items], cfg.prompt_length_quantile)
        said = f"longer than the {cfg.prompt_length_quantile:g} quantile, {limit} tokens"
        rules.append((said, lambda at: len(items[at].token_ids) > limit))
    rules.append(("too long", lambda at: len(items[at].token_ids) > cfg.max_prompt_length))
    if limits and cfg.max_answer_length is not None:
        most = cfg.max_answer_length
        rules.append((f"answers longer than {most} tokens", lambda at: (answer_lengths[at] or 0) > most))
    drops: Drops = {said: 0 for said, _ in rules}
    kept = []
    for at, item in enumerate(items):
        reason = next((said for said, applies in rules if applies(at)), None)
        if reason is None:
            kept.append(item)
        else:
            drops[reason] += 1
    return kept, drops


def question_text(item: Prompt) -> str:
    """What makes two rows the same question: its words, however they are spaced."""
    question = item.columns["question"]
    return " ".join(question.split()) if isinstance(question, str) else json.dumps(question, sort_keys=True)


def split(items: Sequence[Prompt], size: float, seed: int, source: str) -> tuple[list[Prompt], list[Prompt]]:
    """Cut a held-out part off: (to train on, held out). size: a share below 1, or a number of rows.

    A hash of seed and text orders the questions, and the first ones are held out until there are enough rows; so rows
    that ask the same are on one side, and adding rows moves no question to the other side unless the size says so.
    Raises UserError when nothing would be left on one of the sides.
    """
    wanted = round(size * len(items)) if size < 1 else int(size)
    texts = [question_text(item) for item in items]
    order = sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    rows_of: dict[str, int] = {}
    for text in texts:
        rows_of[text] = rows_of.get(text, 0) + 1
    chosen: set[str] = set()
    count = 0
    for text in order:
        if count >= wanted:
            break
        chosen.add(text)
        count += rows_of[text]
    if not 0 < count < len(items):
        raise UserError(
            f"eval_split_size: {size:g} of the {len(items)} questions of {source} leaves {len(items) - count} to train "
            f"on and {count} held out, and both need one. Choose another size, or 0."
        )
    trained = [item for item, text in zip(items, texts, strict=True) if text not in chosen]
    return trained, [item for item, text in zip(items, texts, strict=True) if text in chosen]


def check_unique(cells: Sequence[Any], source: str, column: str) -> None:
    """Refuse ids that are missing or there twice. Raises UserError naming file, rows and column."""
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
