"""What a run says: lines on the console and in train.log, points on curves, completions as text. Rank 0 only."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from grpo.checkpoints.best import METRIC, Best
from grpo.config.settings import Config, prompts_per_step, tracker_names
from grpo.data.questions import Questions, length_summary
from grpo.errors import warn
from grpo.rollout import Engine
from grpo.run.completions_log import RolloutFile, as_markdown, as_table, rollouts_of
from grpo.run.console import Console, sft_line, step_line
from grpo.run.languages import label
from grpo.run.trackers import Tracker, check_trackers, load_trackers
from grpo.runtime.distributed import World
from grpo.training.metrics import Tally
from grpo.training.policy import Policy
from grpo.training.scoring import Scored, rollout_metrics
from grpo.types import Table

OF_ROLLOUTS = {
    "ratio_gap",
    "sampler_gap/max",
    "guards/oom_rollout",
    "idle/rollout",
    "time/rollout_s",
    "time/reward_s",
    "time/logprobs_s",
}


class RunLog:
    """Console and trackers of one run."""

    def __init__(self, cfg: Config, world: World, folder: Path):
        """Raises UserError when a tracker's package is missing."""
        check_trackers(cfg)
        self.cfg = cfg
        self.world = world
        self.folder = folder
        self._label = partial(label, cfg.console_language)
        self.console = Console(world.is_main, folder / "train.log")
        self.say = self.console.say
        self.trackers: list[Tracker] = []
        self.rollouts: RolloutFile | None = None
        self.best: Best | None = None  # rank 0's
        self.total = 0
        self.extras: Callable[[], dict[str, float]] = dict  # metrics of rank 0 alone, such as what saves have cost

    def open(self, total: int, done: int) -> None:
        """Trackers and the progress bar, for the steps from `done` on."""
        self.total = total
        if self.world.is_main:
            self.best = Best(self.cfg, done)
            self.trackers = load_trackers(self.cfg, self.folder, done)
        if self.cfg.log_samples_steps:
            with self._rollouts_optional():
                self.rollouts = RolloutFile(self.folder, self.world.rank, done)
        self.console.start(total, done)

    def close(self) -> None:
        """Write out what is pending."""
        for tracker in self.trackers:
            self._tell(tracker, tracker.close)
        if self.rollouts is not None:
            self.rollouts.close()

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is on record, for all ranks alike: resuming does not repeat it."""
        found = False
        if self.world.is_main:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = (row for row in map(json.loads, lines) if row["step"] == step)
            found = any(name.startswith("eval/") for row in rows for name in row)
        return self.world.any_rank(found)[0]

    def describe_parts(self, questions: Questions, policy: Policy, what: str) -> None:
        """Say on what the run works, and `what` it is about to do."""
        cfg, say = self.cfg, self.say
        where = f"{self.world.size} x {self.world.device.type} ({torch.get_num_threads()} threads each)"
        say(f"model {cfg.model}: {policy.num_parameters / 1e6:.1f}M parameters, {cfg.dtype}, on {where}")
        say(f"data {cfg.data}: {length_summary(questions)}")
        curves = f"; curves: tensorboard --logdir {cfg.runs_dir}" if "tensorboard" in tracker_names(cfg) else ""
        say(what + curves)

    def describe(self, questions: Questions, total: int, policy: Policy, num_chunks: int) -> None:
        """Say what is about to happen."""
        cfg, say = self.cfg, self.say
        self.describe_parts(
            questions, policy, f"{total} steps of {prompts_per_step(cfg)} prompts x {cfg.num_generations} completions"
        )
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
        tally.add("guards/oom_rollout", engine.fitting.halvings)
        told = rollout_metrics(table, advantages, policy.vocab_size)
        metrics = told | self._measured(tally, norms, policy, told["completions/tokens"])
        metrics["guards/trust_sampler"] = float(bool(policy.counters.trust_sampler))
        if self.world.is_main:
            self.say(step_line(step, total, metrics))
            self.console.advance(f"reward {metrics['reward/mean']:.3f}")
        self.log(step, metrics)
        return metrics

    def _measured(self, tally: Tally, norms: Sequence[float], policy: Policy, tokens: float) -> dict[str, float]:
        """What every kind of step has: the tally over ranks, times, guards, rate and norm. tokens: that counted."""
        tally.add("guards/oom_update", policy.fitting.halvings)
        reduced = tally.reduce(self.world)
        metrics = {
            **reduced,
            **self.extras(),
            "lr": policy.last_lr,
            "guards/skipped_updates": float(policy.counters.skipped_updates),
            "tokens_per_s": tokens / max(reduced["time/step_s"], 1e-9),
        }
        if norms:
            metrics |= {
                "grad_norm": float(np.mean(norms)),
                "guards/clipped_updates": float(np.mean([n > self.cfg.max_grad_norm for n in norms])),
            }
        return metrics

    def log_sft_step(
        self, step: int, total: int, tokens: int, tally: Tally, norms: Sequence[float], policy: Policy
    ) -> dict[str, float]:
        """The same of a supervised step, without what belongs to rollouts. tokens: in its loss, over all ranks."""
        measured = self._measured(tally, norms, policy, tokens)
        metrics = {name: value for name, value in measured.items() if name not in OF_ROLLOUTS}
        metrics |= {"sft/loss": metrics.pop("loss"), "sft/tokens": float(tokens)}
        if self.world.is_main:
            self.say(sft_line(step, total, metrics))
            self.console.advance(f"loss {metrics['sft/loss']:.3f}")
        self.log(step, metrics)
        return metrics

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out line."""
        said = []
        if "eval/loss" in metrics:
            loss, share = metrics["eval/loss"], metrics["eval/token_accuracy"]
            said.append(self._label("held_out_loss", loss=loss, right=share))
        if METRIC in metrics:
            accuracy, length = metrics[METRIC], metrics["eval/length_mean"]
            said.append(self._label("held_out_accuracy", accuracy=accuracy, length=length))
        self.say(self._label("held_out", step=step, said=", ".join(said)))
        self.log(step, metrics)
        if METRIC not in metrics:
            return
        every = self.cfg.save_steps
        saved = step > 0 and (step == self.total or (every and step % every == 0))
        if self.best is not None and (saved or (Path(self.cfg.output_dir) / f"checkpoint_{step}").is_dir()):
            try:
                self.best.consider(step, metrics[METRIC])
            except OSError as error:  # a full disk: the pointer is not worth a run
                warn(f"warning: best.json cannot be written ({error}); it keeps what it said")

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

    def log_samples(self, step: int, scored: Scored, advantages: np.ndarray) -> None:
        """This rank's completions as JSON lines, a few as text and as a table, each when due. advantages: [N]."""
        keep, show = (
            every and (step % every == 0 or step == 1)
            for every in (self.cfg.log_samples_steps, self.cfg.log_completions_steps)
        )
        if not (keep or show):
            return
        rollouts = rollouts_of(step, scored, advantages, self.cfg)
        if keep and self.rollouts is not None:
            with self._rollouts_optional():
                self.rollouts.write(rollouts)
        if not rollouts:
            return
        if show and self.world.is_main:
            self.console.show(as_table(rollouts, self.cfg.console_language))
        for tracker in list(self.trackers) if keep else []:
            text = as_markdown(rollouts, self.cfg.console_language)
            self._tell(tracker, lambda tracker=tracker, text=text: tracker.text(step, "samples", text))  # type: ignore[misc]

    @contextmanager
    def _rollouts_optional(self) -> Iterator[None]:
        """A disk that refuses costs the rollouts' file, not the run."""
        try:
            yield
        except OSError as error:
            warn(f"warning: rank {self.world.rank}: no rollouts in {self.folder} from now on ({error})")
            self.rollouts = None
