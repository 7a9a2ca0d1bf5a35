"""SwanLab: one run for one training run, resumes included. Offline runs lie in runs/<name>/swanlab.

Logged are metrics, sampled texts and the settings; no git state, requirements, console output or machine statistics.
"""

import dataclasses
import html
from pathlib import Path

import swanlab

from grpo.config.settings import Config
from grpo.run.trackers import run_id, start_error

PROBES_OFF = ("hardware", "runtime", "requirements", "git", "monitor")  # what the package collects by default


def open_tracker(cfg: Config, folder: Path, done: int) -> "SwanLab":
    """See grpo/run/trackers/__init__.py."""
    return SwanLab(cfg, folder)


class SwanLab:
    """Metrics and texts by step."""

    def __init__(self, cfg: Config, folder: Path):
        """Raises UserError when the package does not start, for example without a login or a network."""
        mode = "online" if cfg.tracker_mode == "online" else "offline"
        log_dir = folder / "swanlab"
        log_dir.mkdir(exist_ok=True)
        try:
            settings = swanlab.Settings(
                interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(PROBES_OFF, False)
            )
            self.run = swanlab.init(
                project=cfg.tracker_project,
                name=cfg.run_name,
                id=run_id(folder, "swanlab"),
                resume="allow",
                log_dir=str(log_dir),
                mode=mode,
                config=dataclasses.asdict(cfg),
                settings=settings,
            )
        except Exception as error:  # the package raises a dozen kinds: validation, network, login
            raise start_error("swanlab", error) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._log(values, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._log({name: swanlab.Text(html.unescape(text))}, step)

    def close(self) -> None:
        try:
            self.run.finish()
        except Exception as error:  # any error of the package becomes a warning of the run
            raise OSError(str(error)) from None

    def _log(self, values: dict, step: int) -> None:
        try:
            self.run.log(values, step=step)
        except Exception as error:
            raise OSError(str(error)) from None
