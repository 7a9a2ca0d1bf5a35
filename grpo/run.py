"""A run's surroundings: its folders, what identifies it, where it starts, what it logs and saves.

train.py is the algorithm; this is the clerk beside it. Only rank 0 writes.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from grpo import checkpoint, guards
from grpo.config import Config, find_path, prompts_per_step
from grpo.console import Console, step_line, warn
from grpo.data import Questions, length_summary
from grpo.distributed import World
from grpo.errors import UserError
from grpo.liveness import Heartbeat, OutputLock, check_folder_shared, check_ranks_agree, report_on_sigterm
from grpo.metrics import Tally
from grpo.policy import Policy
from grpo.prompts import Recipe
from grpo.resume import check_same_run, read_state
from grpo.rewards import Reward, completion_text
from grpo.scoring import Scored
from grpo.trackers import Tracker, load_trackers
from grpo.types import MicroBatch

SHOWN_SAMPLES = 4


class Run:
    """Folders, resume point, logs and checkpoints of one training run."""

    def __init__(self, cfg: Config, world: World):
        self.cfg = cfg
        self.world = world
        self.output_dir = Path(cfg.output_dir)
        assert cfg.run_name is not None
        self.folder = Path(cfg.runs_dir) / cfg.run_name
        self.facts: dict[str, Any] = {}
        self.trackers: list[Tracker] = []
        if world.is_main:
            checkpoint.make_output(self.output_dir)
            self.lock = OutputLock(self.output_dir, warn)  # before anything there is touched
            checkpoint.prepare_output(self.output_dir, cfg.resume)
            self._make_folder()
        self.heartbeat = Heartbeat(self.output_dir, world)
        if world.size > 1:
            report_on_sigterm(self.heartbeat)
        check_folder_shared(world, self.output_dir)
        self.console = Console(world.is_main, self.folder / "train.log")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not checkpoint.checkpoints(self.output_dir):  # a fresh run: keep the curves of the one before
                old = [path for path in self.folder.iterdir() if path.is_file()]
                if old:
                    previous = checkpoint.unused(self.folder.with_name(f"{self.folder.name}-previous"))
                    previous.mkdir()
                    for path in old:
                        path.rename(previous / path.name)
        except OSError as error:
            raise UserError(f"runs_dir: {self.folder} cannot be written: {error}. Choose another --runs_dir.") from None

    def identify(self, questions: Questions, rewards: Sequence[Reward], tokenizer: PreTrainedTokenizerBase) -> None:
        """Fingerprint what decides the trajectory beside the config: base model, data, template, rewards."""
        assert self.cfg.model is not None
        path = find_path(self.cfg.model)
        rows = hashlib.sha256()
        for prompt in questions.items:
            rows.update(json.dumps([prompt.token_ids, prompt.columns], default=str, sort_keys=True).encode())
        sources = "".join(_source(reward) for reward in rewards)
        self.facts = {
            "base_model": checkpoint.tree_sha256(path) if path else self.cfg.model,
            "data": rows.hexdigest(),
            "chat_template": _sha256(str(getattr(tokenizer, "chat_template", None))),
            "reward_source": _sha256(sources),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        check_ranks_agree(self.world, self.cfg, self.facts)

    def resume_point(self) -> Path | None:
        """The checkpoint to continue from, as `resume` says; the same on every rank. Raises UserError."""
        folder = None
        if self.world.is_main and self.cfg.resume != "never":
            folder = checkpoint.newest_valid(self.output_dir, warn)
        chosen = np.array([checkpoint.step_of(folder) if folder else -1.0 if self.world.is_main else 0.0])
        step = int(self.world.sum_rows(chosen)[0])
        if step < 0:
            if self.cfg.resume == "must":
                raise UserError(
                    f"resume: must, but {self.output_dir} holds no valid checkpoint. Use --resume auto to start afresh."
                )
            return None
        folder = self.output_dir / f"checkpoint_{step}"
        check_same_run(folder, read_state(folder), self.cfg, self.facts)
        self.console.say(f"resuming from {folder}")
        return folder

    @contextlib.contextmanager
    def logging(self, total: int, done: int) -> Iterator[None]:
        """Open trackers and the progress bar for the steps from `done` on."""
        if self.world.is_main:
            self.trackers = load_trackers(self.cfg, self.folder, done)
        with self.console:
            self.console.start(total, done)
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                self._report(error)
                raise
            finally:
                for tracker in self.trackers:
                    tracker.close()

    def describe(self, questions: Questions, total: int, policy: Policy, num_chunks: int) -> None:
        """Say what is about to happen."""
        cfg, say = self.cfg, self.console.say
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

    def _report(self, error: Exception) -> None:
        """One line that names rank, phase and step, before the traceback; and which rank went first, if one did."""
        first = " ".join(str(error).split())[:200]
        for line in self.heartbeat.gone():
            warn(f"error: {line}")
        warn(f"error: {self.heartbeat.where()}: {type(error).__name__}: {first}")

    def tally(self, step: int) -> Tally:
        """The metrics of step `step` (counted from 1); its phases show in this rank's heartbeat."""
        return Tally(on_phase=lambda phase: self.heartbeat(step, phase))

    def log_step(
        self,
        step: int,
        total: int,
        table_metrics: dict[str, float],
        tally: Tally,
        norms: Sequence[float],
        policy: Policy,
    ) -> dict[str, float]:
        """Reduce this step's metrics over ranks; one line, one point on every curve. Returns them."""
        reduced = tally.reduce(self.world)
        seconds = reduced["time/step_s"]
        counters = policy.counters
        metrics = {
            **table_metrics,
            **reduced,
            "lr": policy.last_lr,
            "guards/skipped_updates": float(counters.skipped_updates),
            "guards/trust_sampler": float(bool(counters.trust_sampler)),
            "tokens_per_s": table_metrics["completions/tokens"] / max(seconds, 1e-9),
        }
        if norms:
            metrics |= {
                "grad_norm": float(np.mean(norms)),
                "guards/clipped_updates": float(np.mean([n > self.cfg.max_grad_norm for n in norms])),
            }
        if self.world.is_main:
            self.console.say(step_line(step, total, metrics))
            self.console.advance(f"reward {metrics['reward/mean']:.3f}")
        self.log(step, metrics)
        return metrics

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out line."""
        self.console.say(f"held-out after {step} steps: accuracy {metrics['eval/accuracy']:.1%} (greedy), "
                         f"length {metrics['eval/length_mean']:.1f}")  # fmt: skip
        self.log(step, metrics)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Points on curves."""
        for tracker in self.trackers:
            tracker.scalars(step, metrics)

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
        for tracker in self.trackers:
            tracker.text(step, "samples", "\n\n---\n\n".join(blocks))

    def due(self, step: int, total: int) -> bool:
        """Whether step `step` (counted from 1) saves: every save_steps, and the last."""
        return step == total or (self.cfg.save_steps > 0 and step % self.cfg.save_steps == 0)

    def save(self, step: int, policy: Policy, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Write checkpoint_{step}, all ranks together."""
        folder = checkpoint.save(self.output_dir, step, policy, tokenizer, recipe, self.cfg, self.facts)
        self.console.say(f"saved {folder}")

    def finish(self, first: int, total: int) -> None:
        """The last word."""
        if not self.world.is_main:
            return
        newest = checkpoint.checkpoints(self.output_dir)
        if first >= total > 0:
            print(f"nothing to do: {newest[0]} is already the last of {total} steps. Ask it: python inference.py "
                  "\"question\"; train anew: --resume never.")  # fmt: skip
        elif newest:
            print(f'done: {newest[0]}. Ask it: python inference.py --checkpoint {newest[0]} "question"')

    def quarantine(self, step: int, minibatch: Sequence[MicroBatch], reason: str) -> None:
        """Keep this rank's part of a skipped update."""
        saved = [folder.name for folder in checkpoint.checkpoints(self.output_dir)]
        weights = f"{saved[0] if saved else self.cfg.model}, then the steps up to {step}"
        folder = self.output_dir / "anomalies" / f"step_{step}"
        guards.quarantine(folder, self.world.rank, minibatch, weights, reason, dataclasses.asdict(self.cfg))
        self.console.say(f"step {step}: update skipped on all ranks ({reason}); kept in {folder}")


def forget_exit(output_dir: Path) -> None:
    """Drop an earlier run's exit.json, so that a run that crashes does not end with its code."""
    with contextlib.suppress(OSError):
        (output_dir / "exit.json").unlink()


def write_exit(output_dir: Path, code: int, reason: str) -> None:
    """exit.json: the worker's own exit code, which torchrun turns into 1; the launch scripts return it."""
    with contextlib.suppress(OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "exit.json").write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _source(reward: Reward) -> str:
    try:
        return inspect.getsource(reward.function)
    except (OSError, TypeError):
        return reward.name


def _escape(text: str) -> str:
    """Model text is shown, not rendered: no HTML, line breaks kept."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "  \n")
