"""Where metrics go. A tracker sees floats and strings only, on rank 0 only; a new one is a class and an entry here.

A tracker raises OSError when it cannot write; the run then goes on without it.
"""

import importlib.util
import re
import secrets
from pathlib import Path
from typing import Protocol

from grpo.config.settings import Config, tracker_names
from grpo.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}


class Tracker(Protocol):
    """Takes what a run has to say."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text, Markdown; < and & of the model's are escaped."""

    def close(self) -> None:
        """Write out what is pending."""


def check_trackers(cfg: Config) -> None:
    """Refuse a tracker whose package is missing, on every rank alike and before anything runs. Raises UserError."""
    for name in tracker_names(cfg):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"report_to: {name} is not installed. Install it (pip install {PACKAGES[name]}), or choose another: "
                "--report_to tensorboard."
            )


def load_trackers(cfg: Config, folder: Path, done: int) -> list[Tracker]:
    """The trackers of `report_to`, and the JSON lines that are always written. Raises UserError.

    done: steps already done; what a lost run logged beyond them is dropped, it will be logged again.
    """
    from grpo.run.trackers.jsonl import JsonLines

    trackers: list[Tracker] = [JsonLines(folder, done)]
    for name in tracker_names(cfg):
        if name == "tensorboard":
            from grpo.run.trackers.tensorboard import TensorBoard

            trackers.append(TensorBoard(cfg, folder, done))
        elif name == "wandb":
            from grpo.run.trackers.wandb import Wandb

            trackers.append(Wandb(cfg, folder))
        elif name == "swanlab":
            from grpo.run.trackers.swanlab import SwanLab

            trackers.append(SwanLab(cfg, folder))
    return trackers


def lasting_id(folder: Path, name: str) -> str:
    """The id under which a tracker knows this run: made once, kept in the run's folder, so that a resume goes on."""
    file = folder / f"{name}_id"
    if file.is_file() and re.fullmatch(r"[0-9a-f]{16}", said := file.read_text(errors="replace").strip()):
        return said
    made = secrets.token_hex(8)
    file.write_text(made + "\n", encoding="utf-8")
    return made


def refused(name: str, error: BaseException) -> UserError:
    """A tracker's package did not start: one line. Only rank 0 knows."""
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    told = UserError(
        f"report_to: {name} could not start: {reason}. Log in, use --tracker_mode offline, or choose another tracker."
    )
    told.on_one_rank = True
    return told
