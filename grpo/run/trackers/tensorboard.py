"""TensorBoard events under runs/<name>; `tensorboard --logdir runs` shows them.

What matters comes first: the group `OVERVIEW` of the first tab repeats the metrics of `CHARTS` under names that sort
before all others, and the tab Custom Scalars draws them as charts of several curves. The tab HParams has the settings
beside the last value of `RESULTS`.
"""

import dataclasses
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from grpo.config.held_out import eval_sets, eval_tag
from grpo.config.settings import Config

OVERVIEW = "0 overview"
CHARTS: dict[str, tuple[str, ...]] = {  # title -> expressions for whole names of metrics
    "reward": ("reward/mean", "reward/[^/]+/mean"),
    "held-out accuracy": (
        "eval/(.+/)?accuracy",
        "eval/(?!.*(user/|length_mean|accuracy_se|pass@)).+",
    ),
    "length": ("completions/length_mean", "completions/length_max"),
    "share truncated": ("completions/truncated",),
    "entropy": ("entropy", "entropy/true"),
    "groups without variance": ("reward/zero_std_groups",),
    "KL and sampler gap": ("kl", "kl_old", "sampler_gap/mean"),
    "tokens per second": ("tokens_per_s",),
    "seconds by phase": ("time/(step|rollout|reward|exchange|logprobs|update)_s",),
}
SFT_CHARTS: dict[str, tuple[str, ...]] = {
    "loss": ("sft/loss", "eval/(.+/)?loss"),
    "tokens right": ("sft/token_accuracy", "eval/(.+/)?token_accuracy"),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_s",),
    "seconds by phase": ("time/(step|update)_s",),
}


def open_tracker(cfg: Config, folder: Path, done: int) -> "TensorBoard":
    """See grpo/run/trackers/__init__.py."""
    return TensorBoard(cfg, folder, done)


def overview_tag(name: str, charts: Mapping[str, tuple[str, ...]]) -> str | None:
    """The name of a metric in the group that is shown first; None: it is not in it.

    >>> overview_tag("reward/mean", CHARTS), overview_tag("entropy", CHARTS), overview_tag("lr", CHARTS)
    ('0 overview/1a reward/mean', '0 overview/5a entropy', None)
    """
    for number, expressions in enumerate(charts.values(), 1):
        for letter, expression in zip("abc", expressions):
            if re.fullmatch(expression, name):
                return f"{OVERVIEW}/{number}{letter} {name}"
    return None


def _no_traceback_for_disk_errors(args: threading.ExceptHookArgs) -> None:
    """The writer's thread raises a disk error again in the next call, which warns: a traceback here is redundant."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)


class TensorBoard:
    """Scalars, histograms, sampled completions, the config as text and as hyper-parameters."""

    def __init__(self, cfg: Config, folder: Path, done: int):
        threading.excepthook = _no_traceback_for_disk_errors
        self.writer = SummaryWriter(str(folder), purge_step=done + 1)
        self.charts: Mapping[str, tuple[str, ...]] | None = None  # known with the first step's metrics
        self.done = done
        settings = dataclasses.asdict(cfg)
        self.writer.add_text("config", "```json\n" + json.dumps(settings, indent=2, ensure_ascii=False) + "\n```", done)
        plain = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in settings.items()}
        accuracies = [eval_tag(name, "eval/accuracy") for name in eval_sets(cfg)]
        results = dict.fromkeys([*accuracies, "reward/mean", "completions/length_mean"], 0.0)  # names; values are read
        for summary in hparams(plain, results):  # add_hparams would write to a folder of its own
            self._add(summary, done)

    def _add(self, summary: object, step: int) -> None:
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary, step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.charts is None:
            self.charts = SFT_CHARTS if "sft/loss" in values or "eval/loss" in values else CHARTS
            self._add(custom_scalars({"overview": _multiline(self.charts)}), self.done)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
            if (tag := overview_tag(name, self.charts)) is not None:
                self.writer.add_scalar(tag, value, step)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Distributions of a step: name -> [n]."""
        for name, numbers in values.items():
            known = numbers[np.isfinite(numbers)]
            if len(known):
                self.writer.add_histogram(f"distribution/{name}", known, step, bins=_edges(known))

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Edges of at most 30 bins. Numbers that rounding alone tells apart share one: numpy has bins of no such width."""
    low, high = float(numbers.min()), float(numbers.max())
    if high - low <= 1e-6 * max(1.0, abs(low), abs(high)):
        width = max(0.5, 1e-3 * abs(low))
        return np.array([low - width, high + width])
    return np.linspace(low, high, 31)


def _multiline(charts: Mapping[str, tuple[str, ...]]) -> dict[str, list]:
    return {title: ["Multiline", [f"^{one}$" for one in expressions]] for title, expressions in charts.items()}
