"""An index of a run's logged completions: what is filtered and sorted by in memory, texts on disk until asked for.

The page gets the index as binary columns and the texts by number:

    uint32 length of the header, the header (JSON), then each column of `COLUMNS` and of the rewards, 8-byte aligned
"""

import hashlib
import json
import math
import re
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from grpo.view.lines import BLOCK, GrowingFile, number, open_regular, parse_line, whole_number

COLUMNS = {  # name -> type code of `array`
    "step": "i",
    "row": "i",
    "held_out": "i",  # 1: an answer to a held-out question
    "question": "i",  # number of its question and gold answer, in the order of appearance
    "finish": "i",  # place in `FINISHES`
    "length": "i",  # tokens; -1: not recorded
    "characters": "i",
    "reward": "f",  # NaN: none
    "advantage": "f",
}
KINDS = ("rollouts", HELD_OUT := "held_out")  # <kind>-rank<R>.jsonl
FINISHES = ("stop", "length", "error", "other")
FINISH_NUMBERS = {name: place for place, name in enumerate(FINISHES)}
OTHER = FINISH_NUMBERS["other"]
MAX_PLAIN = 10_000  # questions whose texts are kept
MAX_REWARDS = 64  # reward functions with a column of their own
PREVIEW = 400  # characters of a text in a list


def text_of(value: Any) -> str:
    """A completion or question as text: what a conversation's messages say, one after another.

    >>> text_of([{"role": "assistant", "content": "4"}, {"role": "tool", "content": "ok"}])
    '[assistant]\\n4\\n[tool]\\nok'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, dict) and "content" in one for one in value):
        return "\n".join(f"[{one.get('role')}]\n{text_of(one['content'])}" for one in value)
    return json.dumps(value, ensure_ascii=False)


def turns_of(value: Any) -> list[list[str]] | None:
    """Role and text of each message of a conversation; None for a plain text."""
    if not (isinstance(value, list) and all(isinstance(one, dict) and "content" in one for one in value)):
        return None
    return [[str(one.get("role")), text_of(one["content"])] for one in value]


def key_of(question: str, gold: Any) -> str:
    """The same for the same question and gold answer in any run."""
    text = f"{question}\0{json.dumps(gold, sort_keys=True)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=9).hexdigest()


def files_of(folder: Path, kind: str) -> list[Path]:
    """The files of one kind, of all ranks."""
    return sorted(folder.glob(f"{kind}-rank*.jsonl"), key=lambda path: (len(path.name), path.name))


class Rollouts:
    """The completions of one run, of all its ranks. Numbers of rows stay while `generation` stays."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.files: list[GrowingFile] = []
        self.of_file: list[array] = []  # [files] numbers of its rows, in their order in it
        self.columns = {name: array(code) for name, code in COLUMNS.items()}
        self.rewards: dict[str, array] = {}  # by function
        self.where: tuple[array, array, array] = (array("H"), array("q"), array("i"))  # file, place, size
        self.questions: dict[str, int] = {}  # key -> number
        self.plain: dict[tuple[str, str] | None, int] = {}  # question and gold answer -> the same, without hashing
        self.bad = 0  # lines left out

    def __len__(self) -> int:
        return len(self.columns["step"])

    def refresh(self) -> None:
        """Read what was appended since the last call; begin anew where a file was rewritten."""
        if any(file.was_rewritten() for file in self.files):
            self.generation += 1
            self._clear()
        known = {file.path for file in self.files}
        found = [path for kind in KINDS for path in files_of(self.folder, kind)]
        for path in found:
            if path not in known:
                self.files.append(GrowingFile(path))
                self.of_file.append(array("i"))
        for index, file in enumerate(self.files):
            try:
                for place, line in file.new_lines():
                    try:
                        self.bad += bool(line.strip()) and not self._add(index, place, line)
                    except RecursionError:  # nested too deeply to be written again
                        self.bad += 1
            except OSError:
                continue  # a link, or it has gone: said by `problems`

    def problems(self) -> list[str]:
        """What could not be read, in words."""
        found = [f"{file.path.name} cannot be read" for file in self.files if file.inode is None]
        if bad := self.bad + sum(file.too_long for file in self.files):
            found.append(f"{bad} damaged lines of completions left out")
        return found

    def _add(self, file: int, place: int, line: bytes) -> bool:
        """Add a line to the index; False where it is no rollout."""
        one = parse_line(line)
        if one is None:
            return False
        step, row = whole_number(one.get("step")), whole_number(one.get("row"))
        if step is None or row is None or "completion" not in one:
            return False
        rewards, length, completion = one.get("rewards"), one.get("length"), one["completion"]
        known = rewards if isinstance(rewards, dict) else {}
        question = self._question(one.get("question", ""), one.get("gold"))
        values = (
            step,
            row,
            self.files[file].path.name.startswith(HELD_OUT),
            question,
            FINISH_NUMBERS.get(one["finish"], OTHER) if isinstance(one.get("finish"), str) else OTHER,
            -1 if whole_number(length) is None else length,
            len(completion if isinstance(completion, str) else text_of(completion)),
            float32(one.get("reward")),
            float32(one.get("advantage")),
        )
        for name in known.keys() - self.rewards.keys():  # the columns change from here on, and nothing below can fail
            if len(self.rewards) < MAX_REWARDS:
                self.rewards[name] = array("f", [float("nan")]) * len(self)
        for name, column in self.rewards.items():
            column.append(float32(known.get(name)))
        for column, value in zip(self.columns.values(), values):
            column.append(value)  # type: ignore[arg-type]
        self.of_file[file].append(len(self) - 1)
        for column, value in zip(self.where, (file, place, len(line))):
            column.append(value)
        return True

    def _question(self, question: Any, gold: Any) -> int:
        """The number of a question with its gold answer."""
        plain = (question, gold) if isinstance(question, str) and isinstance(gold, str) else None
        if plain in self.plain:
            return self.plain[plain]
        number_of = self.questions.setdefault(key_of(text_of(question), gold), len(self.questions))
        if plain is not None and len(self.plain) < MAX_PLAIN:
            self.plain[plain] = number_of
        return number_of

    def packed(self, rows: Sequence[int] | None = None, first: int = 0) -> bytes:
        """The columns of the rows from `first` on, or of `rows`, as the page reads them."""
        columns = self.columns | {f"reward:{name}": column for name, column in self.rewards.items()}
        chosen = {
            name: column[first:] if rows is None else array(column.typecode, [column[row] for row in rows])
            for name, column in columns.items()
        }
        count = len(chosen["step"])
        header: dict[str, Any] = {
            "generation": self.generation,
            "first": first,
            "count": count,
            "finishes": FINISHES,
            "rewards": list(self.rewards),
            "questions": list(self.questions),
            "columns": [[name, column.typecode] for name, column in chosen.items()],
        }
        text = json.dumps(header).encode()
        text += b" " * (-(4 + len(text)) % 8)
        parts = [struct.pack("<I", len(text)), text]
        for column in chosen.values():
            if sys.byteorder == "big":
                column = array(column.typecode, column)
                column.byteswap()
            parts.append(column.tobytes() + b"\0" * (-len(column) * column.itemsize % 8))
        return b"".join(parts)

    def records(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """The lines of rows as written, in this order; {} for one that is no longer there."""
        wanted = list(rows)
        by_file: dict[int, list[int]] = {}
        for row in wanted:
            by_file.setdefault(self.where[0][row], []).append(row)
        found: dict[int, dict[str, Any]] = {}
        for index, own in by_file.items():
            try:
                lines = self.files[index].at([(self.where[1][row], self.where[2][row]) for row in own])
            except OSError:
                continue
            found |= {row: parse_line(line) or {} for row, line in zip(own, lines)}
        return [found.get(row, {}) for row in wanted]

    def shown(self, rows: Iterable[int], whole: bool) -> list[dict[str, Any]]:
        """The texts of rows for the page. whole: with all fields; else the beginning of question and completion."""
        shown: list[dict[str, Any]] = []
        for one in self.records(rows):
            question, completion = text_of(one.get("question", "")), text_of(one.get("completion", ""))
            if not whole:
                shown.append({"question": question[:PREVIEW], "completion": completion[:PREVIEW]})
                continue
            extra = extra if isinstance(extra := one.get("extra"), dict) else {}
            shown.append(
                {
                    "question": question,
                    "completion": completion,
                    "turns": turns_of(one.get("completion")),
                    "gold": None if one.get("gold") is None else text_of(one["gold"]),
                    "extracted": None if one.get("extracted") is None else text_of(one["extracted"]),
                    "extra": {str(name): text_of(value) for name, value in extra.items()},
                }
            )
        return shown

    def search(self, text: str) -> list[int]:
        """Numbers of the rows whose question, completion or gold answer has a text; ASCII letters in either case."""
        spellings = {
            json.dumps(text, ensure_ascii=ascii)[1:-1].encode("utf-8", "surrogatepass") for ascii in (False, True)
        }
        pattern = re.compile(b"|".join(map(re.escape, sorted(spellings))), re.I)
        wanted = _folded(text)
        found: list[int] = []
        for rows, file in zip(self.of_file, self.files):
            try:
                with open_regular(file.path) as opened:
                    for row, line in self._candidates(opened, rows, pattern):
                        one = parse_line(line) or {}
                        texts = (text_of(one.get(name, "")) for name in ("completion", "question", "gold"))
                        if any(wanted in _folded(own) for own in texts):
                            found.append(row)
            except OSError:
                continue
        return sorted(found)

    def _candidates(self, file: BinaryIO, rows: array, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
        """Row and line of the lines that a pattern matches, read in blocks of lines."""
        _, places, sizes = self.where
        first = 0
        while first < len(rows):
            start, last = places[rows[first]], first
            while last + 1 < len(rows) and places[rows[last + 1]] + sizes[rows[last + 1]] - start <= BLOCK:
                last += 1
            file.seek(start)
            block = file.read(places[rows[last]] + sizes[rows[last]] - start)
            starts = [places[row] - start for row in rows[first : last + 1]]
            match = pattern.search(block)
            while match:
                at = bisect_right(starts, match.start()) - 1
                row = rows[first + at]
                end = starts[at] + sizes[row]
                if match.start() < end:  # else it lies in a line that is no row
                    yield row, block[starts[at] : end]
                match = pattern.search(block, max(end, match.end()))
            first = last + 1


def _folded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").lower()


def float32(value: Any) -> float:
    """The number as far as a float32 holds it, beyond that an infinity; NaN for what is no number.

    >>> float32(0.5), float32(1e39), float32("1")
    (0.5, inf, nan)
    """
    value = number(value)
    return value if abs(value) < 3.4e38 or value != value else math.copysign(math.inf, value)
