"""An index of the figures of single tokens: tokens-rank<R>.jsonl, written by grpo/run/tokens_log.py.

A row has a line from the rank that sampled it and one from the rank that trained on it; the page gets them as one.
"""

from pathlib import Path
from typing import Any

from grpo.view.lines import GrowingFile, number, parse_line, whole_number
from grpo.view.rollouts import files_of


class Tokens:
    """Where the lines of each row stand, of one run and all its ranks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.files: list[GrowingFile] = []
        self.where: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (step, row) -> file, place, size
        self.bad = 0

    def refresh(self) -> None:
        """Read what was appended since the last call; begin anew where a file was thinned or cut."""
        if any(file.was_rewritten() for file in self.files):
            self.generation += 1
            self._clear()
        known = {file.path for file in self.files}
        found = files_of(self.folder, "tokens")
        self.files += [GrowingFile(path) for path in found if path not in known]
        for index, file in enumerate(self.files):
            try:
                for place, line in file.new_lines():
                    one = parse_line(line)
                    step, row = (whole_number((one or {}).get(name)) for name in ("step", "row"))
                    if step is None or row is None:
                        self.bad += bool(line.strip())
                    else:
                        self.where.setdefault((step, row), []).append((index, place, len(line)))
            except OSError:
                continue

    def problems(self) -> list[str]:
        """What could not be read, in words."""
        found = [f"{file.path.name} cannot be read" for file in self.files if file.inode is None]
        return found + ([f"{self.bad} damaged lines of token figures left out"] if self.bad else [])

    def of(self, step: int, row: int) -> dict[str, Any] | None:
        """The figures of a row's tokens; None: none were logged. Lists that are not as long as `ids` are left out."""
        merged: dict[str, Any] = {}
        for index, place, size in self.where.get((step, row), []):
            try:
                [line] = self.files[index].at([(place, size)])
            except OSError:
                continue
            merged |= parse_line(line) or {}
        ids = merged.get("ids")
        if not isinstance(ids, list):
            return None
        lists = {name: value for name, value in merged.items() if isinstance(value, list) and len(value) == len(ids)}
        shown: dict[str, Any] = {
            name: [one if isinstance(one, str) else _number(one) for one in value] for name, value in lists.items()
        }
        trained = merged.get("trained")
        return shown | ({"trained": trained} if isinstance(trained, str) and len(trained) == len(ids) else {})


def _number(value: Any) -> float | None:
    shown = number(value)
    return shown if abs(shown) < 1e300 else None
