"""Trackio: one run for one training run, resumes included, in a local database that `trackio show` opens.

The database is trackio's own (TRACKIO_DIR, else its folder in the hub's cache), or where TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL say. With `tracker_mode: offline` it lies in runs/<name>/trackio and nothing is sent:
`TRACKIO_DIR=runs/<name>/trackio trackio show`.

Logged are metrics, sampled texts and the settings; no machine statistics.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.config.settings import Config
from grpo.run.trackers import run_id, start_error

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")


def open_tracker(cfg: Config, folder: Path, done: int) -> "Trackio":
    """See grpo/run/trackers/__init__.py."""
    if cfg.tracker_mode == "offline":
        os.environ["TRACKIO_DIR"] = str((folder / "trackio").absolute())  # read when the package is imported
        for name in REMOTE:
            os.environ.pop(name, None)
    return Trackio(cfg, folder)


class Trackio:
    """Metrics and texts by step."""

    def __init__(self, cfg: Config, folder: Path):
        """Raises UserError when the package does not start, for example without a login for a Space."""
        try:
            with _said_on_stdout_left_out():
                import trackio

                self.package: Any = trackio
                self.run = trackio.init(
                    project=cfg.tracker_project,
                    name=f"{cfg.run_name}-{run_id(folder, 'trackio')[:8]}",  # a resume is found by its name alone
                    resume="allow",
                    config=dataclasses.asdict(cfg),
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except Exception as error:  # the package raises those of its database, of the hub's client and of HTTP
            raise start_error("trackio", error) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(dict(values), step=step)  # never raises: the package warns, and keeps what it cannot send

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.package.Markdown(text)}, step=step)

    def close(self) -> None:
        with _said_on_stdout_left_out():
            self.package.finish()


@contextmanager
def _said_on_stdout_left_out() -> Iterator[None]:
    """The package greets on stdout, which belongs to the run's own lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
