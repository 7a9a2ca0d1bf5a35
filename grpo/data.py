"""Questions: files and hub datasets -> Prompts, and the endless stream that deals them out.

`Questions.prompts(step)` is a pure function of (seed, step): epoch after epoch of permutations, cut every
P prompts. There is no sampler state; resuming seeks.
"""

import dataclasses
import glob
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config import Config, find_path
from grpo.data_checks import check_file, check_saved_folder
from grpo.errors import UserError
from grpo.prompts import Recipe, build, encode, render
from grpo.rollout.randomness import permutation
from grpo.templates import end_renderers
from grpo.types import Prompt

FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """Open a file, a saved folder or a hub dataset. Raises UserError.

    Local files are checked before `datasets` reads them, and nothing in them is run: `datasets` knows no loading
    scripts any more, and a folder is only ever opened as one that `save_to_disk` wrote.
    """
    path = find_path(name)
    try:
        if path is None:
            if name.startswith((".", "/", "~")) or Path(name).suffix in FILE_READERS:
                raise UserError(f"data: no such file {name!r}. Give a file, a folder saved by datasets, or a hub name.")
            return _plain(datasets.load_dataset(name, config, split=split))
        if path.is_dir():
            check_saved_folder(path)
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise UserError(f"data: {name} has no split {split!r}, only {sorted(loaded)}. Use --data_split.")
                loaded = loaded[split]
            return _plain(loaded)
        reader = FILE_READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"data: {name}: unknown file type {path.suffix!r}, allowed are {', '.join(FILE_READERS)}.")
        check_file(path, reader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas, about columns of mixed types
            return _plain(datasets.load_dataset(reader, data_files=glob.escape(str(path)), split="train"))
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen kinds: the border between their errors and ours
        raise UserError(
            f"data: {name!r} could not be read: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from None


def _plain(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows as plain values: no format of the folder's choice, nothing decoded that would open other files."""
    rows.data.validate(full=True)  # offsets and UTF-8, before anything follows them
    rows = rows.with_format(None)
    for column, feature in rows.features.items():
        raw = _undecoded(feature)
        if raw != feature:
            rows = rows.cast_column(column, raw)
    return rows


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if getattr(feature, "decode", False) is True else feature


def hash_answer(text: str) -> str | None:
    """GSM8K's gold answer: what follows the last ####.

    >>> hash_answer("2+2=4\\n#### 1,000 ")
    '1,000'
    >>> hash_answer("four") is None
    True
    """
    _, marker, gold = text.rpartition("####")
    return gold.strip() if marker else None


def gold_answers(cells: Sequence[Any], answer_format: str, source: str, column: str) -> list[str]:
    """Gold answers of a column as text. Raises UserError naming the first row without one."""
    golds = []
    for row, cell in enumerate(cells):
        odd = isinstance(cell, (dict, list, bytes)) or (isinstance(cell, float) and not math.isfinite(cell))
        gold = None if cell is None or odd else hash_answer(str(cell)) if answer_format == "hash" else str(cell)
        if not gold or not gold.strip():
            wanted = "text with '#### answer'" if answer_format == "hash" else "a gold answer"
            raise UserError(
                f"data: {source}, row {row + 1}, column {column!r}: expected {wanted}, got {str(cell)[:60]!r}. "
                "Mend or drop the row, or see --answer_format."
            )
        golds.append(gold)
    return golds


@dataclass(frozen=True)
class Questions:
    """Usable prompts of one data source, and their order."""

    items: list[Prompt]
    num_dropped: int  # longer than max_prompt_length
    seed: int = 0

    def first_questions(self, count: int) -> list[str]:
        """The first questions as a user would type them."""
        return [question for item in self.items[:count] if isinstance(question := item.columns.get("question"), str)]

    def prompts(self, step: int, num_prompts: int) -> list[Prompt]:
        """The P prompts of a step.

        >>> items = [Prompt(i, "", (), {}) for i in range(3)]
        >>> stream = Questions(items, 0, seed=7)
        >>> sorted(p.row for step in range(3) for p in stream.prompts(step, 2))
        [0, 0, 1, 1, 2, 2]
        """
        picks = range(step * num_prompts, (step + 1) * num_prompts)
        orders = {
            epoch: permutation(self.seed, epoch, len(self.items)) for epoch in {i // len(self.items) for i in picks}
        }
        return [self.items[orders[i // len(self.items)][i % len(self.items)]] for i in picks]


def load_questions(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> Questions:
    """Read, check and tokenize the training (or held-out) questions. Raises UserError."""
    name = cfg.eval_data if held_out else cfg.data
    assert name is not None
    rows = load_rows(name, cfg.eval_split if held_out else cfg.data_split, cfg.data_config)
    if held_out and cfg.eval_rows:
        rows = rows.select(range(min(cfg.eval_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"data: {name} holds no rows. Give at least one question.")
    for setting, column in (("question_column", cfg.question_column), ("answer_column", cfg.answer_column)):
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"data: {name} has no column {column!r}, only {rows.column_names}. Map it: --{setting} NAME."
            )
    columns = _columns_in_template(cfg, rows, name)
    if cfg.answer_column is not None:
        columns["answer"] = gold_answers(columns[cfg.answer_column], cfg.answer_format, name, cfg.answer_column)
    items: list[Prompt] = []
    num_dropped = 0
    for row, question in enumerate(_cells(rows, cfg.question_column, name)):
        here = {key: values[row] for key, values in columns.items()} | {"question": question}
        prompt = _make_prompt(
            len(items), question, here, recipe, tokenizer, f"{name}, row {row + 1}", cfg.question_column
        )
        if len(prompt.token_ids) > cfg.max_prompt_length:
            num_dropped += 1
        else:
            items.append(prompt)
    if not items:
        raise UserError(
            f"data: every prompt of {name} ({num_dropped}) is longer than max_prompt_length {cfg.max_prompt_length}. "
            "Raise it, or shorten system_prompt."
        )
    end_renderers()  # the run does not ask again: do not keep an idle process, about 100 MB, for each rank
    return Questions(items, num_dropped, cfg.seed)


def _columns_in_template(cfg: Config, rows: datasets.Dataset, name: str) -> dict[str, list[Any]]:
    for used in re.findall(r"\{(\w+)\}", cfg.prompt_template):
        if used != "question" and used not in rows.column_names:
            raise UserError(f"prompt_template: {name} has no column {used!r}, only {rows.column_names}.")
    return {column: _cells(rows, column, name) for column in rows.column_names}


def _cells(rows: datasets.Dataset, column: str, name: str) -> list[Any]:
    """A column as Python values. Raises UserError."""
    try:
        return list(rows[column])
    except Exception as error:  # a feature of datasets met bytes that it cannot decode
        raise UserError(
            f"data: {name}, column {column!r} could not be read: {' '.join(str(error).split())[:300]}"
        ) from None


def _make_prompt(
    index: int, question: Any, columns: dict[str, Any], recipe: Recipe, tokenizer: PreTrainedTokenizerBase,
    source: str, column: str,
) -> Prompt:  # fmt: skip
    is_messages = isinstance(question, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in question
    )
    if not (is_messages and question) and not (isinstance(question, str) and question.strip()):
        raise UserError(
            f"data: {source}, column {column!r}: expected a question, got {str(question)[:60]!r}. Mend or drop the row."
        )
    messages = build(recipe, question, columns)
    try:
        text = render(recipe, messages, tokenizer)
        ids = encode(recipe, text, tokenizer)
    except UserError as error:
        raise UserError(f"{error} (data: {source})") from None
    if not ids:
        raise UserError(f"data: {source}, column {column!r}: the tokenizer makes no token of {text[:60]!r}.")
    return Prompt(index, text, tuple(ids), columns, messages if recipe.chat or is_messages else None)


def length_summary(questions: Questions) -> str:
    """One line on how many prompts were kept, and how long they are."""
    lengths = np.array([len(item.token_ids) for item in questions.items])
    return (
        f"{len(lengths)} questions kept, {questions.num_dropped} dropped as too long; prompt tokens "
        f"median {math.floor(np.median(lengths))}, longest {lengths.max()}"
    )
