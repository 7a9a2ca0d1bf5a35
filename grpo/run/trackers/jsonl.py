"""metrics.jsonl: one JSON object a step, for plots and tests."""

import json
import math
import os
import re
from pathlib import Path
from typing import TextIO


def open_after(path: Path, done: int) -> TextIO:
    """A file of JSON lines, opened to append, after `drop_after`."""
    drop_after(path, done)
    return path.open("a", encoding="utf-8", errors="backslashreplace")  # a lone surrogate: its JSON escape


def drop_after(path: Path, done: int) -> None:
    """Drop lines of steps after `done`, damaged ones, and a cut last line. Raises OSError, with the file as it was."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    kept = "".join(line for line in re.findall(r"[^\n]*\n", text) if _step_of(line) <= done)  # not at U+2028
    if kept != text:
        new = path.with_suffix(".new")
        new.write_text(kept, encoding="utf-8", errors="surrogateescape")
        os.replace(new, path)


def _step_of(line: str) -> float:
    """Infinity for a line that is none of a log."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


class JsonLines:
    """Appends to runs/<name>/metrics.jsonl. A resumed run first drops lines of steps after `done`."""

    def __init__(self, folder: Path, done: int):
        self.file = open_after(folder / "metrics.jsonl", done)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Not written: completions_log.py writes texts."""

    def close(self) -> None:
        self.file.close()
