"""output_dir/best.json: the checkpoint that did best on the held-out questions so far.

    {"checkpoint": "checkpoint_40", "step": 40, "metric": "eval/accuracy", "value": 0.83}

The metric is the accuracy, or, for a first reward function that is not just right or wrong, its mean: eval/NAME. Of
several held-out sets the first one decides.

Rank 0 writes it atomically when an evaluation improves and that step is saved. `save_total_limit` does not remove the
checkpoint that it names. It may name one whose save failed, or that was removed since: readers verify the checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

from grpo.config.held_out import eval_sets, eval_tag
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.strict_json import read_object

FILE = "best.json"
METRIC = "eval/accuracy"
MEASURED_ON = ("eval_split", "eval_rows", "eval_generations")  # values measured in another way do not compare


def read_best(output_dir: Path) -> dict[str, Any] | None:
    """The content of best.json; None when the file is missing or not valid."""
    try:
        best = read_object(output_dir / FILE)
    except (OSError, ValueError):
        return None
    step, value = best.get("step"), best.get("value")
    metric = best.get("metric")
    valid = type(step) is int and best.get("checkpoint") == f"checkpoint_{step}"
    valid = valid and isinstance(metric, str) and metric.startswith("eval/")
    return best if valid and isinstance(value, (int, float)) and not isinstance(value, bool) else None


def best_name(output_dir: Path) -> str | None:
    """The name of the best checkpoint, such as checkpoint_40; None when none is known."""
    best = read_best(output_dir)
    return None if best is None else str(best["checkpoint"])


def best_folder(output_dir: Path) -> Path:
    """The best checkpoint's folder, which exists but is not verified. Raises UserError when none is known."""
    name = best_name(output_dir)
    if name is None or not (output_dir / name).is_dir():
        raise UserError(
            f"best: {output_dir / FILE} names no checkpoint that is there. Train with eval_data and eval_steps, or "
            "choose one: --checkpoint."
        )
    return output_dir / name


def _first_set(eval_data: Any) -> Any:
    """The set that decides: the only one, or name and path of the first of several."""
    return next(iter(eval_data.items()), None) if isinstance(eval_data, dict) else eval_data


class BestCheckpoint:
    """Keeps best.json of one run up to date. For rank 0."""

    def __init__(self, cfg: Config, done: int):
        """Read best.json; remove it when it belongs to another run, to steps after `done`, or to other questions."""
        self.path = Path(cfg.output_dir) / FILE
        self.value: float | None = None
        self.first_set = next(iter(eval_sets(cfg)), "")
        self.metric = METRIC
        best = read_best(self.path.parent)
        if best is not None and best["step"] <= done and self._same_questions(cfg, best["checkpoint"]):
            self.value, self.metric = float(best["value"]), best["metric"]
        else:
            self.path.unlink(missing_ok=True)

    def _same_questions(self, cfg: Config, name: str) -> bool:
        try:
            saved_config = read_object(self.path.parent / name / "trainer" / "state.json")["config"]
            saved = {key: saved_config.get(key, getattr(Config(), key)) for key in MEASURED_ON}
            same_set = _first_set(saved_config["eval_data"]) == _first_set(cfg.eval_data)
            return same_set and all(saved[key] == getattr(cfg, key) for key in MEASURED_ON)
        except (OSError, ValueError, KeyError, AttributeError):
            return False  # that checkpoint is missing or damaged

    def metric_of(self, metrics: dict[str, float], first: str) -> str | None:
        """The metric of an evaluation that decides: the one of the best so far, if it has it. first: reward's name.

        A graded reward that happens to be 0 or 1 everywhere is still compared by its mean.
        """
        tags = [eval_tag(self.first_set, metric) for metric in (METRIC, f"eval/{first}")]
        return next((tag for tag in (self.metric, *tags) if tag in metrics), None)

    def consider(self, step: int, value: float, metric: str = METRIC) -> bool:
        """Point to checkpoint_<step>, which is or will be saved, if `value` is higher or of another metric.

        Raises OSError.
        """
        if self.value is not None and metric == self.metric and value <= self.value:
            return False
        best = {"checkpoint": f"checkpoint_{step}", "step": step, "metric": metric, "value": value}
        staging = self.path.with_name(f".{FILE}-{os.getpid()}")
        staging.write_text(json.dumps(best) + "\n", encoding="utf-8")
        os.replace(staging, self.path)
        self.value, self.metric = value, metric
        return True
