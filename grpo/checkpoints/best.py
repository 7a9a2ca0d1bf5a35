"""output_dir/best.json: which checkpoint did best on the held-out questions so far.

    {"checkpoint": "checkpoint_40", "step": 40, "metric": "eval/accuracy", "value": 0.83}

Rank 0 writes it, whole or not at all, when an evaluation improves and that step is saved. `save_total_limit` spares
the checkpoint it names. It may name one whose save failed, or that was removed since: readers verify, as always.
"""

import json
import os
from pathlib import Path
from typing import Any

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.strict_json import read_object

FILE = "best.json"
METRIC = "eval/accuracy"
MEASURED_ON = ("eval_data", "eval_split", "eval_rows")  # values on other questions do not compare


def read_best(output_dir: Path) -> dict[str, Any] | None:
    """What best.json says; None when there is none, or when it makes no sense."""
    try:
        best = read_object(output_dir / FILE)
    except (OSError, ValueError):
        return None
    step, value = best.get("step"), best.get("value")
    fits = type(step) is int and best.get("checkpoint") == f"checkpoint_{step}" and best.get("metric") == METRIC
    return best if fits and isinstance(value, (int, float)) and not isinstance(value, bool) else None


def best_name(output_dir: Path) -> str | None:
    """The name of the best checkpoint, such as checkpoint_40; None when none is known."""
    best = read_best(output_dir)
    return None if best is None else str(best["checkpoint"])


def best_folder(output_dir: Path) -> Path:
    """The best checkpoint's folder, there but not yet verified. Raises UserError when none is known."""
    name = best_name(output_dir)
    if name is None or not (output_dir / name).is_dir():
        raise UserError(
            f"best: {output_dir / FILE} names no checkpoint that is there. Train with eval_data and eval_steps, or "
            "choose one: --checkpoint."
        )
    return output_dir / name


class Best:
    """The pointer of one run. For rank 0."""

    def __init__(self, cfg: Config, done: int):
        """Take up what stands there, unless it belongs to another run, to lost steps, or to other questions."""
        self.path = Path(cfg.output_dir) / FILE
        self.value: float | None = None
        best = read_best(self.path.parent)
        if best is not None and best["step"] <= done and self._same_questions(cfg, best["checkpoint"]):
            self.value = float(best["value"])
        else:
            self.path.unlink(missing_ok=True)

    def _same_questions(self, cfg: Config, name: str) -> bool:
        try:
            before = read_object(self.path.parent / name / "trainer" / "state.json")["config"]
            return all(before.get(key) == getattr(cfg, key) for key in MEASURED_ON)
        except (OSError, ValueError, KeyError, AttributeError):
            return False  # that checkpoint is gone or damaged: there is nothing to point to

    def consider(self, step: int, value: float) -> bool:
        """Point to checkpoint_<step>, which is or will be there, if it did better. Raises OSError."""
        if self.value is not None and value <= self.value:
            return False
        best = {"checkpoint": f"checkpoint_{step}", "step": step, "metric": METRIC, "value": value}
        aside = self.path.with_name(f".{FILE}-{os.getpid()}")
        aside.write_text(json.dumps(best) + "\n", encoding="utf-8")
        os.replace(aside, self.path)
        self.value = value
        return True
