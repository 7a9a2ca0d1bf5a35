"""Trackers: where metrics and sampled texts are sent. They run on rank 0 only and receive floats and strings only.

A new tracker NAME is one file, NAME.py in this folder, and its name in `report_to` in grpo/config/settings.py. The
file holds a class with the methods of `Tracker` below and a function open_tracker(cfg, folder, done) that returns one.
NAME is also the name of the package that the file needs; the file is imported only when `report_to` names it.
"""

import importlib
import importlib.util
import re
import secrets
from pathlib import Path
from typing import Protocol

from grpo.config.names import tracker_names
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.run.trackers.jsonl import JsonLines


class Tracker(Protocol):
    """Receives the metrics of a run. A method raises OSError when it cannot write; the run then drops the tracker."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a step."""

    # A tracker may also have histograms(step, {name: numbers [n]}): distributions of a step.

    def text(self, step: int, name: str, text: str) -> None:
        """A Markdown text, in which < and & of the model's text are escaped."""

    def close(self) -> None:
        """Send or write what is pending."""


def check_trackers(cfg: Config) -> None:
    """Refuse a tracker whose package is missing, on every rank, before training. Raises UserError."""
    for name in tracker_names(cfg):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"report_to: {name} is not installed. Install it (pip install {name}), or choose another: "
                "--report_to tensorboard."
            )


def load_trackers(cfg: Config, folder: Path, done: int) -> list[Tracker]:
    """metrics.jsonl, which is always written, and the trackers of `report_to`. Raises UserError.

    done: finished steps. What an interrupted run logged after them is dropped, because it will be logged again.
    """
    trackers: list[Tracker] = [JsonLines(folder, done)]
    for name in tracker_names(cfg):
        module = importlib.import_module(f"{__name__}.{name}")
        trackers.append(module.open_tracker(cfg, folder, done))
    return trackers


def run_id(folder: Path, name: str) -> str:
    """A tracker's id of this run: drawn once and stored in the run's folder, so that a resume continues the curves."""
    file = folder / f"{name}_id"
    if file.is_file() and re.fullmatch(
        r"[0-9a-f]{16}", stored := file.read_text(encoding="utf-8", errors="replace").strip()
    ):
        return stored
    new = secrets.token_hex(8)
    file.write_text(new + "\n", encoding="utf-8")
    return new


def start_error(name: str, error: BaseException) -> UserError:
    """One line for a tracker's package that did not start. The error occurs on rank 0 only."""
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    user_error = UserError(
        f"report_to: {name} could not start: {reason}. Log in, use --tracker_mode offline, or choose another tracker."
    )
    user_error.on_one_rank = True
    return user_error
