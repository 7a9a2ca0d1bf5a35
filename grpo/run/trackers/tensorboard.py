"""TensorBoard events under runs/<name>; `tensorboard --logdir runs` shows them."""

import dataclasses
import json
import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from grpo.config.settings import Config


def open_tracker(cfg: Config, folder: Path, done: int) -> "TensorBoard":
    """See grpo/run/trackers/__init__.py."""
    return TensorBoard(cfg, folder, done)


def _no_traceback_for_disk_errors(args: threading.ExceptHookArgs) -> None:
    """The writer's thread raises a disk error again in the next call, which warns: a traceback here is redundant."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)


class TensorBoard:
    """Scalars, sampled completions, the config as text and as hyper-parameters."""

    def __init__(self, cfg: Config, folder: Path, done: int):
        threading.excepthook = _no_traceback_for_disk_errors
        self.writer = SummaryWriter(str(folder), purge_step=done + 1)
        settings = dataclasses.asdict(cfg)
        self.writer.add_text("config", "```json\n" + json.dumps(settings, indent=2, ensure_ascii=False) + "\n```", done)
        plain = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in settings.items()}
        for summary in hparams(plain, {"reward/mean": 0.0}):  # add_hparams would write to a folder of its own
            assert self.writer.file_writer is not None
            self.writer.file_writer.add_summary(summary, done)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()
