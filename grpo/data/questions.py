"""Questions: files and hub datasets -> Prompts, and the endless stream that deals them out.

`Questions.prompts(step)` is a pure function of (seed, step): epoch after epoch of permutations, cut every
P prompts. There is no sampler state; resuming seeks.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.data.chat_templates import end_renderers
from grpo.data.filters import Drops, check_unique, keep_short, split
from grpo.data.gold_answers import gold_answers, hash_answer
from grpo.data.prompt_cache import Job, Made, make_all
from grpo.data.recipe import Recipe, build, encode, render
from grpo.data.sources import load_rows
from grpo.errors import UserError
from grpo.randomness import permutation
from grpo.types import Prompt

__all__ = ["Questions", "hash_answer", "length_summary", "load_questions", "load_rows"]


@dataclass(frozen=True)
class Questions:
    """Usable prompts of one data source, and their order."""

    items: list[Prompt]
    num_dropped: int  # by all rules together
    seed: int = 0
    drops: Drops = field(default_factory=dict)  # by which rule

    def first_questions(self, count: int) -> list[str]:
        """The first questions as a user would type them."""
        return [question for item in self.items[:count] if isinstance(question := item.columns.get("question"), str)]

    def prompts(self, step: int, num_prompts: int) -> list[Prompt]:
        """The P prompts of a step.

        >>> items = [Prompt(i, "", (), {}) for i in range(3)]
        >>> stream = Questions(items, 0, seed=7)
        >>> sorted(p.data_row for step in range(3) for p in stream.prompts(step, 2))
        [0, 0, 1, 1, 2, 2]
        """
        picks = range(step * num_prompts, (step + 1) * num_prompts)
        orders = {epoch: _order(self.seed, epoch, len(self.items)) for epoch in {i // len(self.items) for i in picks}}
        return [self.items[orders[i // len(self.items)][i % len(self.items)]] for i in picks]


@lru_cache(maxsize=2)  # an epoch's, and the next one's where a step has of both; all epochs of a run would be a leak
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return permutation(seed, epoch, size)


def load_questions(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> Questions:
    """Read, check and tokenize the training (or held-out) questions. Raises UserError.

    Held-out questions are those of eval_data, or else the part of data that eval_split_size cuts off.
    """
    apart = held_out and cfg.eval_data is not None
    name = cfg.eval_data if apart else cfg.data
    assert name is not None
    rows = load_rows(name, cfg.eval_split if apart else cfg.data_split, cfg.data_config)
    if apart and cfg.eval_rows:
        rows = rows.select(range(min(cfg.eval_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"data: {name} holds no rows. Give at least one question.")
    cells = _read_columns(cfg, rename(rows, cfg.column_names, name), name)
    items, answer_lengths, no_number = _make_prompts(cfg, recipe, tokenizer, cells, name)
    end_renderers()  # the run does not ask again: do not keep an idle process, about 100 MB, for each rank
    items, drops = keep_short(items, answer_lengths, cfg, limits=not apart)
    if no_number:
        drops["answers that are no numbers"] = no_number
    if not items:
        raise UserError(
            f"data: every prompt of {name} ({drops['too long']}) is longer than max_prompt_length "
            f"{cfg.max_prompt_length}{_said(drops)}. Raise the limit, or shorten system_prompt."
        )
    if not apart:
        items, drops = _choose(cfg, items, drops, held_out, name)
    items = [dataclasses.replace(item, data_row=row) for row, item in enumerate(items)]
    return Questions(items, sum(drops.values()), cfg.seed, drops)


def _choose(cfg: Config, items: list[Prompt], drops: Drops, held_out: bool, name: str) -> tuple[list[Prompt], Drops]:
    """The first data_rows; then the part to train on, or the one held out."""
    if cfg.data_rows and len(items) > cfg.data_rows:
        drops = {**drops, f"after the first {cfg.data_rows} (data_rows)": len(items) - cfg.data_rows}
        items = items[: cfg.data_rows]
    if not cfg.eval_split_size:
        return items, drops
    trained, held = split(items, cfg.eval_split_size, cfg.seed, name)
    if held_out:
        return held[: cfg.eval_rows or None], drops
    return trained, {**drops, "held out for evaluation": len(held)}


def rename(rows: datasets.Dataset, names: Mapping[str, str], source: str) -> datasets.Dataset:
    """Call columns as column_names says, unless the new name is there already. Raises UserError."""
    there = rows.column_names
    for old, new in names.items():
        if old in rows.column_names and new in rows.column_names and old != new:
            raise UserError(f"column_names: {source} has both columns {old!r} and {new!r}. Choose another new name.")
        if old in rows.column_names:
            rows = rows.rename_column(old, new)
        elif new not in rows.column_names:
            raise UserError(f"column_names: {source} has no column {old!r}, only {there}.")
    return rows


def _read_columns(cfg: Config, rows: datasets.Dataset, name: str) -> dict[str, list[Any]]:
    """All columns as Python values, once those that the settings name are known to be there. Raises UserError."""
    for setting in ("question_column", "answer_column", "id_column"):
        column = getattr(cfg, setting)
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"data: {name} has no column {column!r}, only {rows.column_names}. Map it: --{setting} NAME."
            )
    for used in _in_template(cfg):
        if used not in rows.column_names:
            raise UserError(f"prompt_template: {name} has no column {used!r}, only {rows.column_names}.")
    cells = {column: _cells(rows, column, name) for column in rows.column_names}
    if cfg.id_column is not None:
        check_unique(cells[cfg.id_column], name, cfg.id_column)
    for column in _in_template(cfg):
        for row, cell in enumerate(cells[column]):
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                raise UserError(
                    f"data: {name}, row {row + 1}, column {column!r}: the cell is empty, and prompt_template uses it. "
                    "Mend or drop the row."
                )
    return cells


def _in_template(cfg: Config) -> list[str]:
    return [used for used in re.findall(r"\{(\w+)\}", cfg.prompt_template) if used != "question"]


def _cells(rows: datasets.Dataset, column: str, name: str) -> list[Any]:
    """A column as Python values. Raises UserError."""
    try:
        return list(rows[column])
    except Exception as error:  # a feature of datasets met bytes that it cannot decode
        raise UserError(
            f"data: {name}, column {column!r} could not be read: {' '.join(str(error).split())[:300]}"
        ) from None


def _make_prompts(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cells: dict[str, list[Any]], name: str
) -> tuple[list[Prompt], list[int | None], int]:
    """Prompts of all rows with an answer, the tokens of the answers, and how many rows hold no number."""
    questions, answers = cells[cfg.question_column], cells.get(cfg.answer_column or "")
    if cfg.answer_column is not None and answers is not None:
        cells = {**cells, "answer": gold_answers(answers, cfg.answer_format, name, cfg.answer_column)}
    used = [row for row in range(len(questions)) if answers is None or cells["answer"][row] is not None]
    if not used:
        raise UserError(f"data: {name}, column {cfg.answer_column!r}: no row holds a number. See --answer_format.")
    columns = [{key: values[row] for key, values in cells.items()} | {"question": questions[row]} for row in used]
    jobs = []
    for row, here in zip(used, columns, strict=True):
        _check_question(questions[row], f"{name}, row {row + 1}, column {cfg.question_column!r}")
        counted = answers is not None and cfg.max_answer_length is not None
        jobs.append(Job(build(recipe, questions[row], here), str(answers[row]) if counted and answers else None))

    def make(at: int) -> Made:
        try:
            text = render(recipe, jobs[at].messages, tokenizer)
            ids = encode(recipe, text, tokenizer)
        except UserError as error:
            raise UserError(f"{error} (data: {name}, row {used[at] + 1})") from None
        if not ids:
            where = f"{name}, row {used[at] + 1}, column {cfg.question_column!r}"
            raise UserError(f"data: {where}: the tokenizer makes no token of {text[:60]!r}.")
        answer = jobs[at].answer
        length = None if answer is None else len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        return Made(text, tuple(ids), length)

    made = make_all(jobs, recipe, tokenizer, make)
    items: list[Prompt] = []
    for row, one, job, here in zip(used, made, jobs, columns, strict=True):
        talks = recipe.chat or not isinstance(here["question"], str)
        cell = None if answers is None else answers[row]
        items.append(Prompt(len(items), one.text, one.token_ids, here, job.messages if talks else None, cell))
    return items, [one.answer_length for one in made], len(questions) - len(used)


def _check_question(question: Any, where: str) -> None:
    """Text, or a conversation. Raises UserError."""
    is_messages = isinstance(question, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in question
    )
    if not (is_messages and question) and not (isinstance(question, str) and question.strip()):
        raise UserError(f"data: {where}: expected a question, got {str(question)[:60]!r}. Mend or drop the row.")


def _said(drops: Drops) -> str:
    """The rules that left questions out, beside the length limit."""
    return "".join(f", {count} dropped: {rule}" for rule, count in drops.items() if rule != "too long")


def length_summary(questions: Questions) -> str:
    """One line on how many prompts were kept and why others were not, and how long they are."""
    lengths = np.array([len(item.token_ids) for item in questions.items])
    return (
        f"{len(lengths)} questions kept, {questions.drops.get('too long', 0)} dropped as too long"
        f"{_said(questions.drops)}; prompt tokens median {math.floor(np.median(lengths))}, longest {lengths.max()}"
    )
