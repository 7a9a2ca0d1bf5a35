"""`inference.py --csv`: answers multiple-choice questions; each answer is a letter read from the text, or a refusal.

The prompt is the training prompt: the checkpoint's recipe names its columns, and the file's columns are matched to
them by name, by the run's own `column_names`, or by the letter that ends an option's name (選項A, Option A, option_a).
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo.checkpoints.resume import read_state
from grpo.data.file_checks import check_file
from grpo.errors import UserError, warn
from grpo.evaluate.arguments import write_whole
from grpo.evaluate.ask import CheckpointModel
from grpo.evaluate.extract import marker_of, marks_of, plain, strict
from grpo.run.console import Console
from grpo.run.languages import label, language_of
from grpo.runtime.distributed import World

IDS = ("id",)
QUESTIONS = ("question", "題目", "問題", "问题")
OPTION = re.compile(r"(?:選項|选项|option|choice)?[\s_]*([a-d])")
MAX_FIELD = 2**20  # characters of a cell


@dataclass(frozen=True)
class Row:
    """One line of the file: ID, question, and all cells by column name."""

    identity: str
    question: str
    cells: dict[str, str]


def read_questions(path: Path, names: dict[str, str], question_column: str) -> list[Row]:
    """The rows of a test file. Raises UserError naming file, row and column.

    names: other names for columns, as in the run's `column_names`. Columns without a name must be empty.
    """
    check_file(path, "csv")
    csv.field_size_limit(min(sys.maxsize, MAX_FIELD))
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = [cell.strip() for cell in next(lines, [])]
        identity = _column(header, IDS, path, "ID")
        question = _column(header, (*QUESTIONS, question_column.casefold()), path, "Question")
        rows: list[Row] = []
        seen: dict[str, int] = {}
        for number, cells in enumerate(lines, 1):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"csv: {path}, row {number}: {len(cells)} cells, the header has {len(header)}. Mend it."
                )
            named = {names.get(name, name): cell for name, cell in zip(header, cells, strict=True) if name}
            own_id = cells[identity].strip()
            if not own_id or own_id in seen:
                problem = f"{own_id!r} is also that of row {seen[own_id]}" if own_id else "it is empty"
                raise UserError(
                    f"csv: {path}, row {number}, column {header[identity]!r}: {problem}. Give each its own."
                )
            if not cells[question].strip():
                raise UserError(f"csv: {path}, row {number}, column {header[question]!r}: it is empty. Mend the row.")
            seen[own_id] = number
            rows.append(Row(own_id, cells[question], named))
    if not rows:
        raise UserError(f"csv: {path} holds no questions. Give a file with ID, Question and Option A to D.")
    return rows


def _column(header: Sequence[str], wanted: Sequence[str], path: Path, name: str) -> int:
    """The index of the one column called as one of `wanted`. Raises UserError."""
    found = [i for i, cell in enumerate(header) if cell.casefold() in wanted]
    if len(found) != 1:
        raise UserError(f"csv: {path} needs one column {name}, found {len(found)} among {[c for c in header if c]}.")
    return found[0]


def cells_for(template: str, cells: dict[str, str], path: Path) -> dict[str, str]:
    """The file's cells under the names that a prompt template uses. Raises UserError for a missing one.

    >>> cells_for("{question} A. {選項A}", {"Question": "2+2?", "Option A": "4"}, Path("t.csv"))
    {'選項A': '4'}
    """
    by_letter = {option: cell for name, cell in cells.items() if (option := _option(name))}
    found = {}
    for name in re.findall(r"\{(\w+)\}", template):
        if name == "question":
            continue
        option = _option(name)
        if name in cells:
            found[name] = cells[name]
        elif option in by_letter:
            found[name] = by_letter[option]
        else:
            raise UserError(
                f"csv: {path} has no column for {{{name}}} of the checkpoint's prompt, only {list(cells)}. Rename one."
            )
    return found


def _option(name: str) -> str | None:
    """The letter of an option's column.

    >>> _option("Option B"), _option("選項b"), _option("option_c"), _option("Answer")
    ('B', 'B', 'C', None)
    """
    match = OPTION.fullmatch(plain(name).strip().casefold())
    return match[1].upper() if match else None


def predict(
    model: CheckpointModel, folder: Path, source: Path, out: Path, refusal: str | None, batch_rows: int, world: World
) -> str:
    """Answer every row and write ID,Answer. Returns a line of counts. Raises UserError.

    refusal: the marker; None: that of the run's rewards.
    """
    _check_out(out)
    saved: dict[str, Any] = read_state(folder)["config"]
    refusal = refusal or marker_of(saved)
    names = saved.get("column_names")
    question_column = str(saved.get("question_column", "question"))
    rows = read_questions(source, names if isinstance(names, dict) else {}, question_column)
    counts: Counter[str] = Counter()
    answers = {row.identity: refusal for row in rows}
    encoded: list[tuple[Row, tuple[int, ...]]] = []
    for number, row in enumerate(rows, 1):
        columns = cells_for(model.recipe.prompt_template, row.cells, source)
        try:
            encoded.append((row, model.encode(row.question, columns)))
        except UserError as error:
            warn(f"csv: row {number}, ID {row.identity}: not asked, counted as refused: {error}")
            counts["not asked"] += 1
    first = rows[0]
    marks = marks_of(model.text_of(first.question, cells_for(model.recipe.prompt_template, first.cells, source)))
    console = Console(True)
    with console:
        console.start(len(encoded), 0, "questions")
        for answered in model.answer_all([ids for _, ids in encoded], 1, batch_rows, world):
            for i, [answer] in answered:
                choice = strict(answer.text, "choice", marks, refusal)
                counts["unreadable" if choice is None else "refused" if choice == refusal else choice] += 1
                answers[encoded[i][0].identity] = choice or refusal
                console.advance("questions")
    write_whole(out, partial(_write_answers, answers))
    text = partial(label, language_of(saved))
    shown = [f"{name} {counts[name]}" for name in "ABCD"]
    shown += [f"{text(name)} {counts[name]}" for name in ("refused", "unreadable", "not asked")]
    return text("predicted", total=len(rows), counts=", ".join(shown), refusal=refusal, out=out)


def _check_out(out: Path) -> None:
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"out: {out} must be a file in a folder that exists, such as submission.csv.")


def _write_answers(answers: dict[str, str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["ID", "Answer"])
        lines.writerows(answers.items())
