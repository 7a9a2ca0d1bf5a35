"""SwanLab: one run for one training run, resumes included. Offline runs lie in runs/<name>/swanlab.

Sent are metrics, sampled texts and the settings; no git state, requirements, console output or machine statistics.
"""

import dataclasses
import html
from pathlib import Path

import swanlab

from grpo.config.settings import Config
from grpo.run.trackers import lasting_id, refused

UNASKED = ("hardware", "runtime", "requirements", "git", "monitor")  # what the package would collect by itself


class SwanLab:
    """Metrics and texts by step."""

    def __init__(self, cfg: Config, folder: Path):
        """Raises UserError when the package refuses, for want of a login or a network, say."""
        mode = "online" if cfg.tracker_mode == "online" else "offline"
        place = folder / "swanlab"
        place.mkdir(exist_ok=True)
        try:
            settings = swanlab.Settings(
                interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(UNASKED, False)
            )
            self.run = swanlab.init(
                project=cfg.tracker_project,
                name=cfg.run_name,
                id=lasting_id(folder, "swanlab"),
                resume="allow",
                log_dir=str(place),
                mode=mode,
                config=dataclasses.asdict(cfg),
                settings=settings,
            )
        except (
            Exception
        ) as error:  # a dozen kinds, from validation, network and login: the border between theirs and ours
            raise refused("swanlab", error) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point on each curve."""
        self._log(values, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text under this name, shown as it is."""
        self._log({name: swanlab.Text(html.unescape(text))}, step)

    def close(self) -> None:
        """Send or write what is pending."""
        try:
            self.run.finish()
        except Exception as error:  # the border again: a tracker is not worth a run
            raise OSError(str(error)) from None

    def _log(self, values: dict, step: int) -> None:
        try:
            self.run.log(values, step=step)
        except Exception as error:
            raise OSError(str(error)) from None
