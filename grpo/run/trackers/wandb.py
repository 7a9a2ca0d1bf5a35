"""Weights & Biases: one run for one training run, resumes included. Offline runs lie in runs/<name>/wandb.

Logged are metrics, sampled texts, the settings and, by the package itself, the list of installed packages; no source
code, git state, console output or machine statistics.
"""

import dataclasses
from pathlib import Path

import wandb

from grpo.config.settings import Config
from grpo.run.trackers import run_id, start_error


def open_tracker(cfg: Config, folder: Path, done: int) -> "Wandb":
    """See grpo/run/trackers/__init__.py."""
    return Wandb(cfg, folder)


class Wandb:
    """Metrics over the trainer's own step, so that a resumed run may log a step again."""

    def __init__(self, cfg: Config, folder: Path):
        """Raises UserError when the package does not start, for example without a login or a network."""
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        try:
            self.run = wandb.init(
                project=cfg.tracker_project,
                name=cfg.run_name,
                id=run_id(folder, "wandb"),
                resume="allow",
                dir=str(folder),
                mode=cfg.tracker_mode,
                config=dataclasses.asdict(cfg),
                settings=settings,
            )
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as error:
            raise start_error("wandb", error) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        page = f'<pre style="white-space: pre-wrap">{text}</pre>'  # the text is escaped already
        self._log({"step": step, name: wandb.Html(page, inject=False)})

    def close(self) -> None:
        try:
            self.run.finish()
        except wandb.Error as error:
            raise OSError(str(error)) from None

    def _log(self, values: dict) -> None:
        try:
            self.run.log(values)
        except wandb.Error as error:
            raise OSError(str(error)) from None
