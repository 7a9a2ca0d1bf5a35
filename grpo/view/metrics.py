"""The curves of a run, from metrics.jsonl: every number by name, and the seconds at which a step ended."""

from pathlib import Path
from typing import Any

from grpo.view.lines import GrowingFile, number, parse_line, whole_number

FILE = "metrics.jsonl"
MAX_NAMES = 2000
STEP_SECONDS = "time/step_s"


class Metrics:
    """Curves of one run: name -> steps and values. A step that was logged again replaces the earlier line's."""

    def __init__(self, folder: Path):
        self.file = GrowingFile(folder / FILE)
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.curves: dict[str, dict[int, float]] = {}
        self.bad = self.lines = 0

    def refresh(self) -> None:
        """Read what was appended since the last call; begin anew where the file was rewritten."""
        if self.file.was_rewritten():
            self.generation += 1
            self.file = GrowingFile(self.file.path)
            self._clear()
        try:
            for _, line in self.file.new_lines():
                self._add(line)
        except OSError:
            return  # there is none (yet)

    def _add(self, line: bytes) -> None:
        one = parse_line(line)
        step = whole_number((one or {}).get("step"))
        if one is None or step is None:
            self.bad += bool(line.strip())
            return
        self.lines += 1
        for name, value in one.items():
            shown = number(value)
            if name != "step" and shown == shown and (name in self.curves or len(self.curves) < MAX_NAMES):
                self.curves.setdefault(name, {})[step] = shown

    def problems(self) -> list[str]:
        """What could not be read, in words."""
        return [f"{self.bad} damaged lines of metrics left out"] if self.bad else []

    @property
    def last_step(self) -> int:
        """The last step with a metric; 0: none."""
        return max((max(curve) for curve in self.curves.values() if curve), default=0)

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None: never logged."""
        curve = self.curves.get(name)
        return _short(curve[max(curve)]) if curve else None

    def packed(self) -> dict[str, Any]:
        """All curves as lists of steps and values, and the seconds of training after each step."""
        total, seconds = 0.0, {}
        for step, value in sorted(self.curves.get(STEP_SECONDS, {}).items()):
            total += max(0.0, value) if value < 1e9 else 0.0
            seconds[step] = round(total, 3)
        curves = {}
        for name, curve in self.curves.items():
            steps = sorted(curve)
            curves[name] = [steps, [_short(curve[step]) for step in steps]]
        return {"generation": self.generation, "curves": curves, "seconds": [list(seconds), list(seconds.values())]}


def _short(value: float) -> float | None:
    """The value with 6 digits; None for an infinity, which JSON does not have."""
    return float(f"{value:.6g}") if abs(value) < 1e300 else None
