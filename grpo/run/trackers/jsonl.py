"""metrics.jsonl: one JSON object a step, for plots and tests."""

import json
import re
from pathlib import Path
from typing import TextIO


def open_after(path: Path, done: int) -> TextIO:
    """A file of JSON lines, opened to append. Lines of steps after `done` and a cut last line are dropped first."""
    if path.exists():
        lines = re.findall(r"[^\n]*\n", path.read_text(encoding="utf-8"))  # splitlines would cut texts at U+2028
        valid = [line for line in lines if json.loads(line)["step"] <= done]
        path.write_text("".join(valid), encoding="utf-8")
    return path.open("a", encoding="utf-8", errors="backslashreplace")  # a lone surrogate: its JSON escape


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
