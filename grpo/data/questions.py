"""Questions: files and hub datasets -> Prompts, and the prompts of each step.

`Questions.at(slots)` is a pure function of (seed, slots): places of one endless stream, the permutations of all epochs,
one after the other; without `shuffle` each epoch has the order of the data. It has no sampler state: a resumed run goes
on at the place that its checkpoint names.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
from rich import get_console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.data.chat_templates import end_renderers
from grpo.data.filters import Drops, check_unique, keep_short, split
from grpo.data.gold_answers import gold_answers
from grpo.data.nested import cells_of, column_of
from grpo.data.recipe import Recipe, build, encode, render
from grpo.data.sources import Rows, load_rows
from grpo.errors import UserError, warn
from grpo.randomness import permutation
from grpo.types import Prompt


@dataclass(frozen=True)
class Questions:
    """Usable prompts of one data source, and their order."""

    items: list[Prompt]
    num_dropped: int  # by all rules together
    seed: int = 0
    drops: Drops = field(default_factory=dict)  # by each rule
    num_held_out: int = 0  # not dropped: the run is evaluated on them
    shuffle: bool = True

    def first_questions(self, count: int) -> list[str]:
        """The first questions that are plain text."""
        return [question for item in self.items[:count] if isinstance(question := item.columns.get("question"), str)]

    def prompts(self, step: int, num_prompts: int) -> list[Prompt]:
        """The P prompts of a step.

        >>> items = [Prompt(i, "", (), {}) for i in range(3)]
        >>> stream = Questions(items, 0, seed=7)
        >>> sorted(p.data_row for step in range(3) for p in stream.prompts(step, 2))
        [0, 0, 1, 1, 2, 2]
        """
        return self.at(range(step * num_prompts, (step + 1) * num_prompts))

    def at(self, slots: Sequence[int]) -> list[Prompt]:
        """The prompts at these places of the stream."""
        if not self.shuffle:
            return [self.items[i % len(self.items)] for i in slots]
        orders = {epoch: _order(self.seed, epoch, len(self.items)) for epoch in {i // len(self.items) for i in slots}}
        return [self.items[orders[i // len(self.items)][i % len(self.items)]] for i in slots]


@lru_cache(maxsize=2)  # a step takes prompts from at most a few epochs; caching all would be a leak
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return permutation(seed, epoch, size)


def load_questions(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> Questions:
    """Read, check and tokenize the training (or held-out) questions. Raises UserError.

    Held-out questions are those of eval_data, or else the part of data that eval_split_size takes.
    """
    has_own_data = held_out and cfg.eval_data is not None
    name = cfg.eval_data if has_own_data else cfg.data
    assert isinstance(name, str), "several sets are loaded one by one (eval_sets)"
    rows = load_rows(name, cfg.eval_split if has_own_data else cfg.data_split, cfg.data_config)
    if has_own_data and cfg.eval_rows:
        rows = rows.select(range(min(cfg.eval_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"data: {name} holds no rows. Give at least one question.")
    cells = _read_columns(cfg, rename(rows, cfg.column_names, name), name)
    items, answer_lengths, no_number = _make_prompts(cfg, recipe, tokenizer, cells, name)
    end_renderers()  # the run renders no more prompts: end the idle process of each rank, about 100 MB
    items, drops = keep_short(items, answer_lengths, cfg, limits=not has_own_data)
    if no_number:
        drops["answers that are no numbers"] = no_number
    if not items:
        raise _none_left(cfg, drops, name)
    num_held_out = 0
    if not has_own_data:
        items, drops, num_held_out = _choose(cfg, items, drops, held_out, name)
    items = [dataclasses.replace(item, data_row=row) for row, item in enumerate(items)]
    return Questions(items, sum(drops.values()), cfg.seed, drops, num_held_out, cfg.shuffle)


def _none_left(cfg: Config, drops: Drops, name: str) -> UserError:
    """The error that no question is short enough."""
    limit = f"longer than max_prompt_length {cfg.max_prompt_length}"
    others = [f"{rule}: {count}" for rule, count in drops.items() if count and rule != "too long"]
    if not others:
        return UserError(
            f"data: every prompt of {name} ({drops['too long']}) is {limit}. Raise the limit, or shorten system_prompt."
        )
    too_long = [f"prompts {limit}: {drops['too long']}"] if drops["too long"] else []
    reasons = "; ".join([*too_long, *others])
    return UserError(f"data: no question of {name} is left. Left out are {reasons}. Raise these limits.")


def _choose(
    cfg: Config, items: list[Prompt], drops: Drops, held_out: bool, name: str
) -> tuple[list[Prompt], Drops, int]:
    """The first data_rows; of these the part to train on, or the part held out; and how many are held out of it."""
    if cfg.data_rows and len(items) > cfg.data_rows:
        drops = {**drops, f"after the first {cfg.data_rows} (data_rows)": len(items) - cfg.data_rows}
        items = items[: cfg.data_rows]
    if not cfg.eval_split_size:
        return items, drops, 0
    training_items, eval_items = split(items, cfg.eval_split_size, cfg.seed, name)
    if held_out:
        return eval_items[: cfg.eval_rows or None], drops, 0
    return training_items, drops, len(eval_items)


def rename(rows: datasets.Dataset | Rows, names: Mapping[str, str], source: str) -> datasets.Dataset | Rows:
    """Rename columns by column_names, unless a column has the new name already. Raises UserError.

    A part of a column, such as reward_model.ground_truth, becomes a further column.
    """
    columns = rows.column_names
    for old, new in names.items():
        if old not in rows.column_names and new not in rows.column_names and column_of(columns, old):
            rows = _with_part(rows, old, new, source)
            continue
        if old in rows.column_names and new in rows.column_names and old != new:
            raise UserError(f"column_names: {source} has both columns {old!r} and {new!r}. Choose another new name.")
        if old in rows.column_names:
            rows = rows.rename_column(old, new)
        elif new not in rows.column_names:
            raise UserError(f"column_names: {source} has no column {old!r}, only {columns}.")
    return rows


def _with_part(rows: datasets.Dataset | Rows, old: str, new: str, source: str) -> Rows:
    cells = {column: _cells(rows, column, source) for column in rows.column_names}
    try:
        return Rows({**cells, new: cells_of(cells, old)}, len(rows))
    except LookupError as error:
        raise UserError(f"column_names: {source} {error.args[0]}.") from None


def _read_columns(cfg: Config, rows: datasets.Dataset | Rows, name: str) -> dict[str, list[Any]]:
    """All columns as Python values. Raises UserError for a column that a setting names and the data lacks."""
    for column in _in_template(cfg):
        if column not in rows.column_names:
            raise UserError(f"prompt_template: {name} has no column {column!r}, only {rows.column_names}.")
    cells = {column: _cells(rows, column, name) for column in rows.column_names}
    for setting in ("question_column", "answer_column", "id_column"):
        if getattr(cfg, setting) is not None:
            _named(cfg, setting, cells, name)
    if cfg.id_column is not None:
        check_unique(cells_of(cells, cfg.id_column), name, cfg.id_column)
    for column in _in_template(cfg):
        for row, cell in enumerate(cells[column]):
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                raise UserError(
                    f"data: {name}, row {row + 1}, column {column!r}: the cell is empty, and prompt_template uses it. "
                    "Mend or drop the row."
                )
    return cells


def _named(cfg: Config, setting: str, cells: dict[str, list[Any]], name: str) -> list[Any]:
    """The cells of the column that a setting names. Raises UserError."""
    try:
        return cells_of(cells, getattr(cfg, setting))
    except LookupError as error:
        null = "" if setting == "question_column" else ", or null"
        raise UserError(f"data: {name} {error.args[0]}. Map it: --{setting} NAME{null}.") from None


def _in_template(cfg: Config) -> list[str]:
    return [column for column in re.findall(r"\{(\w+)\}", cfg.prompt_template) if column != "question"]


def _cells(rows: datasets.Dataset | Rows, column: str, name: str) -> list[Any]:
    """A column as Python values. Raises UserError."""
    try:
        return list(rows[column])
    except Exception as error:  # bytes that a feature of datasets cannot decode: it raises many exception classes
        raise UserError(
            f"data: {name}, column {column!r} could not be read: {' '.join(str(error).split())[:300]}"
        ) from None


def _make_prompts(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cells: dict[str, list[Any]], name: str
) -> tuple[list[Prompt], list[int | None], int]:
    """Prompts of all rows with an answer, the answers' lengths in tokens, and the number of rows without a number.

    Lengths are None unless max_answer_length needs them. Raises UserError naming the row.
    """
    questions = cells_of(cells, cfg.question_column)
    answers = None if cfg.answer_column is None else cells_of(cells, cfg.answer_column)
    if cfg.answer_column is not None and answers is not None:
        cells = {**cells, "answer": gold_answers(answers, cfg.answer_format, name, cfg.answer_column)}
    used = [row for row in range(len(questions)) if answers is None or cells["answer"][row] is not None]
    if not used:
        raise UserError(f"data: {name}, column {cfg.answer_column!r}: no row holds a number. See --answer_format.")
    for row in used:
        _check_question(questions[row], f"{name}, row {row + 1}, column {cfg.question_column!r}")
    _note_system_turns(cfg, [questions[row] for row in used], name)
    items: list[Prompt] = []
    answer_lengths: list[int | None] = []
    silent = os.environ.get("RANK", "0") != "0" or not get_console().is_terminal
    for row in track(used, "prompts", transient=True, disable=silent):
        columns = {key: values[row] for key, values in cells.items()} | {"question": questions[row]}
        messages = build(recipe, questions[row], columns)
        try:
            text = render(recipe, messages, tokenizer)
            ids = encode(recipe, text, tokenizer)
        except UserError as error:
            raise UserError(f"{error} (data: {name}, row {row + 1})") from None
        if not ids:
            where = f"{name}, row {row + 1}, column {cfg.question_column!r}"
            raise UserError(f"data: {where}: the tokenizer makes no token of {text[:60]!r}.")
        answer = None if answers is None else answers[row]
        counted = answers is not None and cfg.max_answer_length is not None
        answer_ids = tokenizer(str(answer), add_special_tokens=False)["input_ids"] if counted else None
        answer_lengths.append(None if answer_ids is None else len(answer_ids))
        is_conversation = recipe.chat or not isinstance(questions[row], str)
        items.append(Prompt(len(items), text, tuple(ids), columns, messages if is_conversation else None, answer))
    return items, answer_lengths, len(questions) - len(used)


def _check_question(question: Any, where: str) -> None:
    """Text, or a conversation. Raises UserError."""
    turns = [turn for turn in question if isinstance(turn, dict)] if isinstance(question, list) else []
    if any(isinstance(turn.get("content"), list) for turn in turns):
        raise UserError(
            f"data: {where}: expected a question, got a turn whose content is a list of parts, and only text is read. "
            "Join the texts to one; images cannot be used."
        )
    is_messages = isinstance(question, list) and bool(question) and all(map(_is_turn, question))
    if not is_messages and not (isinstance(question, str) and question.strip()):
        raise UserError(
            f"data: {where}: expected a question, got {str(question)[:60]!r}: text, or a list of turns, each with role "
            "and content. Mend or drop the row."
        )
    if is_messages and not any(turn["role"] == "user" and turn["content"].strip() for turn in question):
        raise UserError(
            f"data: {where}: the conversation has no user turn with text, only {[turn['role'] for turn in question]}. "
            "Mend or drop the row."
        )


def _note_system_turns(cfg: Config, questions: list[Any], name: str) -> None:
    """Say that system_prompt is not used where the data have a system turn of their own."""
    own = sum(isinstance(one, list) and any(turn["role"] == "system" for turn in one) for one in questions)
    if own and cfg.system_prompt and os.environ.get("RANK", "0") == "0":
        warn(
            f"data {name}: {own} of {len(questions)} questions have a system turn of their own: no system_prompt there"
        )


def _is_turn(turn: Any) -> bool:
    """Whether it has role and content as text; a turn that only calls tools may lack content; more keys may follow."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    calls_tools = turn.get("content") is None and bool(turn.get("tool_calls")) and turn["role"] != "user"
    return isinstance(turn.get("content"), str) or calls_tools


def _other_drops(drops: Drops) -> str:
    """The rules that left questions out, other than max_prompt_length."""
    return "".join(f", {count} dropped: {rule}" for rule, count in drops.items() if rule != "too long")


def length_summary(questions: Questions) -> str:
    """One line: how many questions are used, how many each rule left out, and how long the prompts are."""
    lengths = np.array([len(item.token_ids) for item in questions.items])
    drops = f"{questions.drops.get('too long', 0)} dropped as too long{_other_drops(questions.drops)}"
    drops += f", {questions.num_held_out} held out for evaluation" if questions.num_held_out else ""
    sizes = f"prompt tokens median {math.floor(np.median(lengths))}, longest {lengths.max()}"
    return f"{len(lengths)} questions kept, {drops}; {sizes}"
