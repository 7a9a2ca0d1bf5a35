"""What a run says: lines on the console and in train.log, points on curves, completions as text. Rank 0 only."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from grpo.config import Config, prompts_per_step
from grpo.console import Console, step_line, warn
from grpo.data import Questions, length_summary
from grpo.distributed import World
from grpo.metrics import Tally
from grpo.policy import Policy
from grpo.rewards import completion_text
from grpo.rollout import Engine
from grpo.scoring import Scored, rollout_metrics
from grpo.trackers import Tracker, load_trackers
from grpo.types import Table

SHOWN_SAMPLES = 4


class Journal:
    """Console and trackers of one run."""

    def __init__(self, cfg: Config, world: World, folder: Path):
        self.cfg = cfg
        self.world = world
        self.folder = folder
        self.console = Console(world.is_main, folder / "train.log")
        self.say = self.console.say
        self.trackers: list[Tracker] = []
        self.extras: Callable[[], dict[str, float]] = dict  # metrics of rank 0 alone, such as what saves have cost

    def open(self, total: int, done: int) -> None:
        """Trackers and the progress bar, for the steps from `done` on."""
        if self.world.is_main:
            self.trackers = load_trackers(self.cfg, self.folder, done)
        self.console.start(total, done)

    def close(self) -> None:
        """Write out what is pending."""
        for tracker in self.trackers:
            self._tell(tracker, tracker.close)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is on record, for all ranks alike: resuming does not repeat it."""
        found = False
        if self.world.is_main:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found = any("eval/accuracy" in row and row["step"] == step for row in map(json.loads, lines))
        return self.world.any_rank(found)[0]

    def describe(self, questions: Questions, total: int, policy: Policy, num_chunks: int) -> None:
        """Say what is about to happen."""
        cfg, say = self.cfg, self.say
        where = f"{self.world.size} x {self.world.device.type} ({torch.get_num_threads()} threads each)"
        say(f"model {cfg.model}: {policy.num_parameters / 1e6:.1f}M parameters, {cfg.dtype}, on {where}")
        say(f"data {cfg.data}: {length_summary(questions)}")
        say(f"{total} steps of {prompts_per_step(cfg)} prompts x {cfg.num_generations} completions; "
            f"curves: tensorboard --logdir {cfg.runs_dir}")  # fmt: skip
        if num_chunks < self.world.size:
            say(
                f"note: {num_chunks} rollout chunks for {self.world.size} processes leave some idle: "
                "lower --rollout_chunk_rows"
            )

    def log_step(
        self,
        step: int,
        total: int,
        table: Table,
        advantages: np.ndarray,
        tally: Tally,
        norms: Sequence[float],
        policy: Policy,
        engine: Engine,
    ) -> dict[str, float]:
        """Reduce this step's metrics over ranks; one line, one point on every curve. Returns them."""
        tally.add("guards/oom_update", policy.room.halvings)
        tally.add("guards/oom_rollout", engine.room.halvings)
        reduced = tally.reduce(self.world)
        told = rollout_metrics(table, advantages, policy.vocab_size)
        seconds = reduced["time/step_s"]
        counters = policy.counters
        metrics = {
            **told,
            **reduced,
            **self.extras(),
            "lr": policy.last_lr,
            "guards/skipped_updates": float(counters.skipped_updates),
            "guards/trust_sampler": float(bool(counters.trust_sampler)),
            "tokens_per_s": told["completions/tokens"] / max(seconds, 1e-9),
        }
        if norms:
            metrics |= {
                "grad_norm": float(np.mean(norms)),
                "guards/clipped_updates": float(np.mean([n > self.cfg.max_grad_norm for n in norms])),
            }
        if self.world.is_main:
            self.say(step_line(step, total, metrics))
            self.console.advance(f"reward {metrics['reward/mean']:.3f}")
        self.log(step, metrics)
        return metrics

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out line."""
        self.say(f"held-out after {step} steps: accuracy {metrics['eval/accuracy']:.1%} (greedy), "
                         f"length {metrics['eval/length_mean']:.1f}")  # fmt: skip
        self.log(step, metrics)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Points on curves."""
        for tracker in list(self.trackers):
            self._tell(tracker, lambda tracker=tracker: tracker.scalars(step, metrics))  # type: ignore[misc]

    def _tell(self, tracker: Tracker, say: Callable[[], None]) -> None:
        """A tracker whose disk refuses is dropped with a warning: curves are not worth a run."""
        try:
            say()
        except OSError as error:
            warn(
                f"warning: {type(tracker).__name__} cannot write to {self.folder} ({error}); it is left out from now on"
            )
            self.trackers = [other for other in self.trackers if other is not tracker]

    def log_samples(self, step: int, scored: Scored) -> None:
        """A few completions of this rank as text, every `log_samples_steps`."""
        every = self.cfg.log_samples_steps
        if not (every and self.trackers and (step % every == 0 or step == 1)):
            return
        blocks = []
        for sample, row in list(zip(scored.samples, scored.scores, strict=True))[:SHOWN_SAMPLES]:
            prompt = sample.prompt if isinstance(sample.prompt, str) else completion_text(sample.prompt)
            shown = [f"**prompt** {prompt}", f"**completion** {completion_text(sample.completion)}",
                     f"**gold** {sample.columns.get('answer')}, **scores** {row.tolist()}"]  # fmt: skip
            blocks.append("\n\n".join(_escape(text) for text in shown))
        text = "\n\n---\n\n".join(blocks)
        for tracker in list(self.trackers):
            self._tell(tracker, lambda tracker=tracker: tracker.text(step, "samples", text))  # type: ignore[misc]


def _escape(text: str) -> str:
    """Model text is shown, not rendered: no HTML, line breaks kept."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "  \n")
