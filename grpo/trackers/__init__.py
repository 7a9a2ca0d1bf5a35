"""Where metrics go. A tracker sees floats and strings only, on rank 0 only; a new one is a class and an entry here."""

from pathlib import Path
from typing import Protocol

from grpo.config import Config


class Tracker(Protocol):
    """Takes what a run has to say."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text, Markdown."""

    def close(self) -> None:
        """Write out what is pending."""


def load_trackers(cfg: Config, folder: Path, done: int) -> list[Tracker]:
    """The trackers of `report_to`, and the JSON lines that are always written.

    done: steps already done; what a lost run logged beyond them is dropped, it will be logged again.
    """
    from grpo.trackers.jsonl import JsonLines

    trackers: list[Tracker] = [JsonLines(folder, done)]
    if cfg.report_to == "tensorboard":
        from grpo.trackers.tensorboard import TensorBoard

        trackers.append(TensorBoard(cfg, folder, done))
    return trackers
