"""What a run logs: lines on the console and in train.log, metrics in trackers, completions as text."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from grpo.checkpoints.best import METRIC, BestCheckpoint
from grpo.config.held_out import eval_sets, metrics_of_set
from grpo.config.names import model_name, tracker_names
from grpo.config.settings import Config, prompts_per_step, updates_per_step
from grpo.data.questions import Questions, length_summary
from grpo.errors import warn
from grpo.rewards import Reward, completion_text, see_groups, short_names
from grpo.rewards.logged import Logs
from grpo.run.completions_log import (
    RolloutFile,
    as_markdown,
    as_table,
    first_of_all,
    forget_other_ranks,
    rollouts_of,
    user_metrics,
)
from grpo.run.console import Console, rounded, sft_line, step_line
from grpo.run.languages import label
from grpo.run.reward_notices import notices
from grpo.run.task import held_out_notices
from grpo.run.tokens_log import TokensLog, TokenTexts
from grpo.run.trackers import Tracker, check_trackers, load_trackers
from grpo.runtime.distributed import World
from grpo.training.metrics import Reduced
from grpo.training.policy import Policy
from grpo.training.rollout_metrics import rollout_metrics
from grpo.training.sampler_correction import with_sample_size
from grpo.training.scoring import Scored
from grpo.types import Table

ROLLOUT_METRICS = {  # measured in every step, but without meaning where nothing is sampled
    "ratio_gap",
    "sampler_gap/max",
    "guards/oom_rollout",
    "idle/rollout",
    "time/rollout_s",
    "time/reward_s",
    "time/logprobs_s",
}


class RunLog:
    """Console and trackers of one run. Only rank 0 writes, except that every rank logs its own completions."""

    def __init__(self, cfg: Config, world: World, folder: Path):
        """Raises UserError when a tracker's package is missing."""
        check_trackers(cfg)
        self.cfg = cfg
        self.world = world
        self.folder = folder
        self._label = partial(label, cfg.console_language)
        self.console = Console(world.is_main, folder / "train.log", cfg.quiet)
        self.write_line = self.console.write_line
        self.trackers: list[Tracker] = []
        self.rollouts: RolloutFile | None = None
        self.tokens = TokensLog(cfg, folder, world.rank, world.size, 0, None)  # nothing, until `log_tokens`
        self.answers: RolloutFile | None = None  # to held-out questions
        self.answered = 0  # steps done before the evaluation that runs
        self.best: BestCheckpoint | None = None  # on rank 0
        self.total = 0
        self.marks: tuple[str, str] | None = None  # around the answer in a completion
        self.of_rewards: Sequence[Reward] = ()
        self.noticed = False  # the first completions were compared with what their rewards read
        self.moved = False  # whether any update had a gradient
        self.last_sample: tuple[int, Scored, np.ndarray] | None = None  # what a key may ask for
        self.without_reward = False  # the last step had no reward: said once
        self.extras: Callable[[], dict[str, float]] = dict  # metrics of rank 0 alone, such as the seconds of saves

    def open(self, total: int, done: int) -> None:
        """Start trackers and the progress bar; `done` steps are finished already."""
        self.total = total
        if self.world.is_main:
            self.best = BestCheckpoint(self.cfg, done)
            self.trackers = load_trackers(self.cfg, self.folder, done)
            forget_other_ranks(self.folder, self.world.size, done)
        if self.cfg.log_samples_steps:
            with self._rollouts_optional():
                self.rollouts = RolloutFile(self.folder, self.world.rank, done)
                self.answers = RolloutFile(self.folder, self.world.rank, done, "held_out")
        self.console.start(total, done, sample=self._show_last_sample)

    def log_tokens(self, tokenizer: PreTrainedTokenizerBase, policy: Policy, done: int) -> None:
        """Log figures of single tokens from now on, where log_tokens_steps says so."""
        if self.cfg.log_tokens_steps:
            where = (self.folder, self.world.rank, self.world.size)
            self.tokens = TokensLog(self.cfg, *where, done, TokenTexts(tokenizer))
            policy.entropy.observe = self.tokens.observe

    def close(self) -> None:
        """Close trackers and files."""
        self.tokens.close()
        for tracker in self.trackers:
            self._call(tracker, tracker.close)
        for file in (self.rollouts, self.answers):
            if file is not None:
                file.close()

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation after `step` steps: a resume does not repeat it. A collective."""
        found = False
        if self.world.is_main:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            of_step = (metrics for metrics in map(json.loads, lines) if metrics["step"] == step)
            found = any(name.startswith("eval/") for metrics in of_step for name in metrics)
        return self.world.any_rank(found)[0]

    def describe_parts(
        self, questions: Questions, held_out: dict[str, Questions], policy: Policy, work: str, updates: int
    ) -> None:
        """Print model, data, devices and `work`, the size of the run; held-out questions where some were left out."""
        cfg, write_line = self.cfg, self.write_line
        where = f"{self.world.size} x {self.world.device.type} ({torch.get_num_threads()} threads each)"
        write_line(f"model {model_name(cfg)}: {policy.num_parameters / 1e6:.1f}M parameters, {cfg.dtype}, on {where}")
        write_line(f"data {cfg.data}: {length_summary(questions)}")
        for name, one in eval_sets(cfg).items():
            if any(held_out[name].drops.values()):
                source = one.eval_data or cfg.data
                write_line(f"held out {f'{name}, {source}' if name else source}: {length_summary(held_out[name])}")
        for line in held_out_notices(cfg, questions, held_out):
            write_line(line)
        curves = f"; curves: tensorboard --logdir {cfg.runs_dir}" if "tensorboard" in tracker_names(cfg) else ""
        write_line(work + curves)
        moves = cfg.lr * updates
        if policy.unseen is not None and moves < policy.unseen:
            write_line(
                f"note: dtype bf16 rounds changes below {policy.unseen:.1e} away, for half of this model's weights; "
                f"{updates} updates at lr {cfg.lr:g} move one by about {moves:.1e}. Use fp32, more steps, a larger lr, "
                "or lora_r (docs/task.md)"
            )

    def describe(
        self,
        questions: Questions,
        held_out: dict[str, Questions],
        total: int,
        policy: Policy,
        rewards: Sequence[Reward],
    ) -> None:
        """Print what the run trains, on what, and a note when ranks will be idle in the rollout."""
        cfg = self.cfg
        work = f"{total} steps of {prompts_per_step(cfg)} prompts x {cfg.num_generations} completions"
        updates = total * updates_per_step(cfg)
        self.describe_parts(questions, held_out, policy, work, updates)
        if cfg.warmup_steps >= updates > 0:
            self.write_line(f"note: warmup_steps {cfg.warmup_steps}: the run has {updates} updates, lr is not reached")
        most_busy = prompts_per_step(cfg) * (1 if see_groups(rewards) else cfg.num_generations)
        if most_busy < self.world.size:
            self.write_line(
                f"note: only {most_busy} of {self.world.size} processes can sample: raise --batch_size or "
                "--num_generations, or use fewer processes"
            )

    def log_step(
        self,
        step: int,
        total: int,
        table: Table,
        advantages: np.ndarray,
        measured: Reduced,
        norms: Sequence[float],
        policy: Policy,
        logs: Logs | None = None,
    ) -> dict[str, float]:
        """Write one step: one line on the console, one point on every curve. Returns the metrics.

        logs: what reward functions logged on this rank.
        """
        of_rollouts = rollout_metrics(table, advantages, policy.vocab_size)
        metrics = of_rollouts | self._measured(measured, norms, policy, of_rollouts["completions/tokens"])
        metrics["guards/trust_sampler"] = float(bool(policy.counters.trust_sampler))
        metrics |= user_metrics(self.world, self.of_rewards, logs or Logs())
        if self.world.is_main:
            self.console.write_step(step_line(step, total, metrics), metrics, "training")
            if "reward/mean" not in metrics and not self.without_reward:
                warn(
                    f"warning: step {step}: no completion has a reward, every function gave None (does not apply, or "
                    "failed): nothing is learned. Check the rewards and the columns that they read."
                )
            self.without_reward = "reward/mean" not in metrics
        self.log(step, metrics)
        self._log_distributions(step, table, advantages)
        return metrics

    def _log_distributions(self, step: int, table: Table, advantages: np.ndarray) -> None:
        """Rewards, lengths and advantages of a step, where a tracker shows distributions. advantages: [N]."""
        if not self._due(self.cfg.log_samples_steps, step):
            return
        known = table.rewards[~np.isnan(table.rewards)]
        values = {"reward": known, "length": table.lengths, "advantage": advantages}
        for tracker in list(self.trackers):
            if (show := getattr(tracker, "histograms", None)) is not None:
                self._call(tracker, partial(show, step, values))

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == 1)

    def _measured(self, measured: Reduced, norms: Sequence[float], policy: Policy, tokens: float) -> dict[str, float]:
        """Metrics of every kind of step, reduced over ranks. tokens: what tokens_per_s counts."""
        metrics = {
            **with_sample_size(measured.metrics),
            **self.extras(),
            "lr": policy.last_lr,
            "guards/skipped_updates": float(policy.counters.skipped_updates),
            "tokens_per_s": tokens / max(measured.metrics["time/step_s"], 1e-9),
        }
        self.moved = self.moved or any(norm > 0 for norm in norms)
        if norms:
            metrics |= {
                "grad_norm": float(np.mean(norms)),
                "guards/clipped_updates": float(np.mean([n > self.cfg.max_grad_norm for n in norms])),
            }
        return metrics

    def log_sft_step(
        self, step: int, total: int, tokens: int, measured: Reduced, norms: Sequence[float], policy: Policy
    ) -> None:
        """`log_step` of a supervised step, without metrics of rollouts. tokens: in its loss, over all ranks."""
        all_metrics = self._measured(measured, norms, policy, tokens)
        metrics = {name: value for name, value in all_metrics.items() if name not in ROLLOUT_METRICS}
        metrics |= {"sft/loss": metrics.pop("loss"), "sft/tokens": float(tokens)}
        if self.world.is_main:
            self.console.write_step(sft_line(step, total, metrics), metrics, "training")
        self.log(step, metrics)

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Print and log an evaluation, a line for each set; update best.json when this step is saved."""
        first = next(iter(short_names(list(self.cfg.rewards)).values()), "")
        for name in eval_sets(self.cfg) or [""]:
            of_set, results = metrics_of_set(name, metrics), []
            if "eval/loss" in of_set:
                loss, accuracy = of_set["eval/loss"], of_set["eval/token_accuracy"]
                results.append(self._label("held_out_loss", loss=rounded(loss, 4), right=accuracy))
            if "eval/length_mean" in of_set:
                results.append(self._held_out_reward(of_set, first))
            shown = f" {name}" if name else ""
            self.write_line(self._label("held_out", name=shown, step=step, results=", ".join(results)))
        shares = [value for name, value in metrics.items() if name == METRIC or name.endswith("/accuracy")]
        self.console.held_out = f"held-out {shares[0]:.1%}" if shares else ""
        self.log(step, metrics)
        metric = self.best.metric_of(metrics, first) if self.best is not None else None
        if self.best is None or metric is None:
            return
        every = self.cfg.save_steps
        saved = step > 0 and (step == self.total or (every and step % every == 0))
        if saved or (Path(self.cfg.output_dir) / f"checkpoint_{step}").is_dir():
            try:
                self.best.consider(step, metrics[metric], metric)
            except OSError as error:  # a full disk must not end the run
                warn(f"warning: best.json cannot be written ({error}); it keeps its old content")

    def _held_out_reward(self, metrics: dict[str, float], first: str) -> str:
        """Accuracy, or the mean of the first reward function; and the length of the answers."""
        length, how = metrics["eval/length_mean"], self._label("greedy")
        if num := self.cfg.eval_generations:
            names = [name for name in (f"pass@{num}", f"maj@{num}") if num > 1 and f"eval/{name}" in metrics]
            shares = [f"{name} {metrics[f'eval/{name}']:.1%}" for name in names]
            how = ", ".join([self._label("sampled", count=num), *shares])
        if METRIC in metrics:
            return self._label("held_out_accuracy", accuracy=metrics[METRIC], length=length, how=how)
        mean = metrics.get(f"eval/{first}")
        shown = self._label("none") if mean is None else f"{rounded(mean, 3):.3f}"
        return self._label("held_out_reward", name=first, mean=shown, length=length, how=how)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step to all trackers."""
        for tracker in list(self.trackers):
            self._call(tracker, lambda tracker=tracker: tracker.scalars(step, metrics))  # type: ignore[misc]

    def _call(self, tracker: Tracker, method: Callable[[], None]) -> None:
        """Call a tracker's method. A tracker that cannot write is dropped with a warning and does not end the run."""
        try:
            method()
        except OSError as error:
            warn(
                f"warning: {type(tracker).__name__} cannot write to {self.folder} ({error}); it is left out from now on"
            )
            self.trackers = [other for other in self.trackers if other is not tracker]

    def log_samples(self, step: int, scored: Scored, advantages: np.ndarray) -> None:
        """This rank's completions as JSON lines, a few as text and as a table, each when due. advantages: [N]."""
        if self.world.is_main and scored.inputs and not self.noticed:
            self.noticed = True
            for line in notices(self.of_rewards, [completion_text(one.completion) for one in scored.inputs]):
                warn(line)
        self.tokens.write(step, scored.completions)
        self.last_sample = (step, scored, advantages)
        to_file, to_console = (
            self._due(every, step) for every in (self.cfg.log_samples_steps, self.cfg.log_completions_steps)
        )
        if not (to_file or to_console):
            return
        rollouts = rollouts_of(step, scored, advantages, self.cfg, self.marks)
        if to_file and self.rollouts is not None:
            with self._rollouts_optional():
                self.rollouts.write(rollouts)
        shown = first_of_all(self.world, rollouts)
        if not shown:
            return
        how = (self.cfg.console_language, self.marks is not None)
        if to_console:
            self.console.show(as_table(shown, *how))
        for tracker in list(self.trackers) if to_file else []:
            text = as_markdown(shown, *how)
            self._call(tracker, lambda tracker=tracker, text=text: tracker.text(step, "samples", text))  # type: ignore[misc]

    def _show_last_sample(self) -> None:
        """Print the first completion that this rank sampled last. Called by a key, between two steps or in one."""
        if self.last_sample is None:
            return
        rollouts = rollouts_of(*self.last_sample, self.cfg, self.marks)
        if rollouts:
            self.console.show(as_table(rollouts[:1], self.cfg.console_language, self.marks is not None))

    def log_answers(self, name: str, scored: Scored) -> None:
        """This rank's answers to a set of held-out questions as JSON lines, where completions are logged."""
        if self.answers is not None:
            none = np.full(scored.num_rows, np.nan)
            with self._rollouts_optional():
                self.answers.write(rollouts_of(self.answered, scored, none, self.cfg, self.marks), set=name)

    @contextmanager
    def _rollouts_optional(self) -> Iterator[None]:
        """A disk error stops the logging of completions, not the run."""
        try:
            yield
        except OSError as error:
            warn(f"warning: rank {self.world.rank}: no rollouts in {self.folder} from now on ({error})")
            self.rollouts = self.answers = None
