"""A run's folders, fingerprint, resume point, log, checkpoints, and its reactions to signals and failures.

train.py and grpo/sft/train.py are the loops; they call a `Run` for everything that is not the algorithm.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.background import Saver, no_gradient
from grpo.checkpoints.fingerprints import fingerprints
from grpo.checkpoints.resume import check_same_run, read_state
from grpo.config.exit_file import forget_exit, write_exit
from grpo.config.settings import Config, shards_weights
from grpo.data.questions import Questions
from grpo.data.recipe import KEPT, Recipe, load_recipe
from grpo.doctor.report import short_form
from grpo.errors import EXIT_BUG, EXIT_STALLED, Corrupted, Lost, Preempted, UserError, warn
from grpo.rewards import Reward
from grpo.run.completions_log import answer_marks
from grpo.run.log import RunLog
from grpo.run.pushing import Pusher, check_push
from grpo.runtime.distributed import World
from grpo.runtime.heartbeat import Heartbeat, Watchdog
from grpo.runtime.signals import Stopping, StopRequest
from grpo.runtime.startup import OutputLock, check_folder_shared, check_ranks_agree
from grpo.training import skipped_updates
from grpo.training.metrics import Tally
from grpo.training.policy import Policy
from grpo.training.special_micro_batches import broken_rows
from grpo.types import Completion, MicroBatch, Notices, Prompt, Pulse

SAVE_MARGIN = 1.5  # before the job is killed, a save starts only if this many times its last duration is left


class Run:
    """Folders, resume point, logs and checkpoints of one training run."""

    def __init__(self, cfg: Config, world: World):
        self.cfg = cfg
        self.world = world
        self.output_dir = Path(cfg.output_dir)
        assert cfg.run_name is not None
        self.folder = Path(cfg.runs_dir) / cfg.run_name
        self.facts: dict[str, Any] = {}  # fingerprints, see `identify`
        self._prepare_folders()
        self.heartbeat = Heartbeat(self.output_dir, world)
        self.stop = StopRequest(self.heartbeat, self.output_dir, cfg.preempt_grace_s)
        check_folder_shared(world, self.output_dir)
        self.heartbeat(0, "start")
        self.log = RunLog(cfg, world, self.folder)
        self.saver = Saver(cfg, self.output_dir, self.heartbeat, self.log.write_line)
        self.log.extras = self.saver.take_seconds
        self.pusher: Pusher | None = None
        if cfg.push_to_hub is not None and world.is_main:
            self.pusher = Pusher(cfg, dataclasses.asdict(cfg), self.output_dir, self.log.write_line)
            self.saver.on_saved = self.pusher.saved
        self.kept_weights = skipped_updates.KeptWeights(self.output_dir / "anomalies", world.rank)
        self.resumed_step = -1

    def _prepare_folders(self) -> None:
        """Rank 0 makes the folders. Raises UserError on every rank when that fails."""
        problem = None
        if self.world.is_main:
            try:
                check_push(self.cfg)
                checkpoint.make_output(self.output_dir)
                self.lock = OutputLock(self.output_dir, warn)  # before any file in it is changed
                checkpoint.prepare_output(self.output_dir, self.cfg.resume)
                self._make_folder()
            except UserError as error:
                problem = error
        (failed,) = self.world.any_rank(problem is not None)
        if failed:
            raise problem or UserError("output_dir, runs_dir: rank 0 could not prepare them, see its error.")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not checkpoint.checkpoint_folders(self.output_dir):  # a new run: set the logs of the last one aside
                old = [path for path in self.folder.iterdir() if path.is_file()]
                if old:
                    previous = checkpoint.unused_path(self.folder.with_name(f"{self.folder.name}-previous"))
                    previous.mkdir()
                    for path in old:
                        path.rename(previous / path.name)
        except OSError as error:
            raise UserError(f"runs_dir: {self.folder} cannot be written: {error}. Choose another --runs_dir.") from None

    def identify(
        self, questions: Questions, rewards: Sequence[Reward], tokenizer: PreTrainedTokenizerBase, **more: str
    ) -> None:
        """Fingerprint what decides the trajectory; check that all ranks have the same settings and fingerprints.

        more: fingerprints that only this kind of run has. Raises UserError.
        """
        self.facts = fingerprints(self.cfg, questions, rewards, tokenizer) | more
        self.log.marks = answer_marks(self.cfg, rewards)
        self.log.of_rewards = rewards
        check_ranks_agree(self.world, self.cfg, self.facts)

    @functools.cached_property
    def _start(self) -> tuple[Path | None, str]:
        """The checkpoint to continue from, by the setting `resume`, and the date; rank 0 finds them for every rank.

        Raises UserError.
        """
        found = np.zeros(7)  # a step, or -1; year to second
        if self.world.is_main:
            folder = checkpoint.newest_valid(self.output_dir, warn) if self.cfg.resume != "never" else None
            found[:] = [checkpoint.step_of(folder) if folder else -1, *datetime.now().timetuple()[:6]]
        step, *date = map(int, self.world.sum_rows(found))
        if step < 0 and self.cfg.resume == "must":
            raise UserError(
                f"resume: must, but {self.output_dir} holds no valid checkpoint. Use --resume auto to start afresh."
            )
        return self.output_dir / f"checkpoint_{step}" if step >= 0 else None, datetime(*date).isoformat()  # type: ignore[arg-type]

    def kept(self) -> dict[str, Any]:
        """Fields of the prompt recipe that a run keeps from its start on; a collective. Raises UserError."""
        folder, date = self._start
        if folder is None:
            return {"date": date}
        recipe = load_recipe(folder / "trainer" / "recipe.json")
        return {name: getattr(recipe, name) for name in KEPT}

    def resume_point(self) -> Path | None:
        """The checkpoint to continue from; the same on every rank. Raises UserError when it is of another run."""
        folder, _ = self._start
        if folder is None:
            return None
        step = checkpoint.step_of(folder)
        check_same_run(folder, read_state(folder), self.cfg, self.facts)
        self.log.write_line(f"resuming from {folder}")
        self.resumed_step = step
        return folder

    @contextlib.contextmanager
    def training(
        self, total: int, done: int, policy: Policy, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
    ) -> Iterator[None]:
        """Run trackers, progress bar, watchdog and signal handling while the steps after `done` are trained.

        policy, tokenizer and recipe are what checkpoints store.
        """
        self.policy, self.tokenizer, self.recipe = policy, tokenizer, recipe
        self.heartbeat(done, "start")
        watchdog = Watchdog(self.heartbeat, self.cfg.stall_timeout_s, self._stalled)
        watchdog.start()
        policy.pulse = self.pulse
        policy.remember_checksums()
        self.stop.training = True
        with self.log.console:
            self.log.open(total, done)
            self.log.log_tokens(tokenizer, policy, done)
            self._record_start(total)
            try:
                yield
                self.saver.finish()
                if self.pusher is not None:
                    self.heartbeat(total, "push")
                    self.pusher.finish(go_on=lambda: not self.pulse())
                self.heartbeat.leave()
                self._record_end(0, "done")
            except UserError as error:
                self._record_end(error.code, str(error), error.on_one_rank)
                if not error.on_one_rank:  # all ranks leave together: let the running save end
                    self.saver.wait()
                    self.heartbeat.leave()
                raise
            except Exception as error:
                self._report(error)
                raise
            finally:
                watchdog.stop()
                if self.pusher is not None:
                    self.pusher.stop()
                self.log.close()

    def _stalled(self, line: str) -> None:
        for folder in (self.output_dir, self.folder):
            write_exit(folder, EXIT_STALLED, line)

    def _record_start(self, total: int) -> None:
        """What the run is, beside its logs, which may be copied elsewhere: run.json. A disk error is a warning."""
        if not self.world.is_main:
            return
        forget_exit(self.folder)
        facts = {"started": datetime.now().isoformat(timespec="seconds"), "total_steps": total}
        facts |= {"processes": self.world.size, "settings": dataclasses.asdict(self.cfg)}
        try:
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            warn(f"warning: {self.folder}/run.json cannot be written ({error})")

    def _record_end(self, code: int, reason: str, on_this_rank: bool = False) -> None:
        """exit.json beside the logs, as in output_dir."""
        if self.world.is_main or on_this_rank:
            write_exit(self.folder, code, reason)

    @property
    def pulse(self) -> Pulse:
        """Called for each piece of work: records progress; returns True when the run should stop after it."""
        return self.stop.pulse

    def _report(self, error: Exception) -> None:
        """Before the traceback, one line with rank, phase and step; and a line for each rank that ended earlier.

        They are in exit.json too, unless the rank that ended earlier has written its own.
        """
        message = " ".join(str(error).split())[:200]
        lines = [*self.heartbeat.gone(), f"{self.heartbeat.where()}: {type(error).__name__}: {message}"]
        for line in lines:
            warn(f"error: {line}")
        for folder in (self.output_dir, self.folder):
            write_exit(folder, EXIT_BUG, "; ".join(lines), first=True)

    def tally(self, step: int) -> Tally:
        """The metrics of step `step` (counted from 1); its phases show in this rank's heartbeat."""
        self.log.tokens.begin(step)
        return Tally(on_phase=lambda phase: self.heartbeat(step, phase))

    def evaluation_due(self, step: int, first: int, total: int) -> bool:
        """Whether to evaluate after `step` steps: before and after training, and every eval_steps.

        A resumed run, whose first step is `first`, does not repeat an evaluation that is logged. A collective: all
        ranks must call it.
        """
        due = step in (0, total) or (self.cfg.eval_steps > 0 and step % self.cfg.eval_steps == 0)
        return due and not (step == first and self.log.evaluated(step))

    def evaluate_if_due(
        self, step: int, first: int, total: int, evaluate: Callable[[int], dict[str, float] | None]
    ) -> None:
        """Log what `evaluate(step)` returns, where `evaluation_due`; {}: nothing is held out.

        Raises Preempted when it returns None.
        """
        if not self.evaluation_due(step, first, total):
            return
        self.heartbeat(step, "eval")
        self.log.answered = step
        metrics = evaluate(step)
        if metrics is None:
            self.preempt()
        if metrics:
            self.log.log_eval(step, metrics)

    def save_if_due(self, step: int, total: int) -> None:
        """Save after step `step` (counted from 1): every save_steps, and the last."""
        if step == total or (self.cfg.save_steps > 0 and step % self.cfg.save_steps == 0):
            self.save(last=step == total)

    def save(self, last: bool = False) -> None:
        """Begin to write checkpoint_<steps done>, all ranks together. last: no other save will follow."""
        self.saver.save(self.policy, self.tokenizer, self.recipe, self.facts, last)

    def notices(self, policy: Policy, step: int) -> tuple[bool, bool]:
        """This rank's notices before an update: it got a stop signal; its weights or moments changed by themselves."""
        every = self.cfg.check_weights_steps
        changed = policy.changed_tensor() if every and step % every == 0 else None
        if changed is not None:
            warn(f"error: {self.heartbeat.where()}: {changed} is not what the last update left: a bit has flipped")
        return self.stop.requested, changed is not None

    def act_on_notices(self, notices: Notices) -> None:
        """Leave the run if a rank's notice requires it, on every rank alike. Raises Corrupted or Preempted."""
        if ranks := notices.corrupted_ranks:
            raise Corrupted(
                f"memory: weights or optimizer state of rank {', '.join(map(str, ranks))} changed between two updates: "
                "a bit has flipped. Nothing of it was saved. Check that machine's memory, then run the same command."
            )
        if notices.stop_requested:
            self.preempt()

    def fail(self, line: str) -> None:
        """Ask all ranks to stop at the next safe point, after a checkpoint: this rank cannot go on."""
        warn(f"error: {self.heartbeat.where()}: {line}")
        self.stop.failure = line

    @property
    def stopping(self) -> Stopping:
        """For parts that wait for others: half of the grace time, and twice what a save took last, stay for saving."""

        def may_wait() -> bool:
            return self.stop.seconds_left() > max(self.cfg.preempt_grace_s / 2, 2 * SAVE_MARGIN * self.saver.expected_s)

        return Stopping(self.fail, self.pulse, may_wait)

    def preempt(self) -> NoReturn:
        """Save if there is something new and time for it. Raises Preempted, or Lost after `fail` on any rank."""
        self.saver.wait()
        step = self.policy.counters.step
        name = f"{self.output_dir}/checkpoint_{step}"
        is_late = self.stop.seconds_left() < SAVE_MARGIN * self.saver.expected_s
        late, lost = self.world.any_rank(is_late, self.stop.failure is not None)
        if step in (0, self.resumed_step) or (self.saver.step == step and self.saver.failure is None):
            outcome = f"{name} holds all finished steps" if step else "no step is finished, nothing to save"
        elif late:
            outcome = f"no time left to save step {step}: the newest checkpoint stays as it is"
        else:
            self.save(last=True)
            self.saver.wait()
            failure = self.saver.failure
            outcome = f"saved {name}" if failure is None else f"{name} could not be written: {failure}"
        if lost:
            reason = self.stop.failure or "another rank cannot go on, see its error"
            raise Lost(f"ended after step {step}: {reason} {outcome}. When that is mended, the same command continues.")
        raise Preempted(f"asked to stop after step {step}; {outcome}. The same command continues.")

    def finish(self, first: int, total: int) -> None:
        """Print the newest checkpoint and how to use it. first: steps done when this process started."""
        if not self.world.is_main:
            return
        newest = checkpoint.checkpoint_folders(self.output_dir)
        if first < total and not self.log.moved:
            warn(f"warning: nothing was learned in the steps from {first + 1} to {total}. {no_gradient(self.cfg)}")
        if first < total and (line := short_form(self.folder, self.cfg.console_language)):
            warn(line)
        if first >= total > 0:
            print(
                f"nothing to do: {newest[0]} is already the last of {total} steps. Ask it: python inference.py "
                f'--checkpoint {newest[0]} "question"; train anew: --resume never.'
            )
        elif newest:
            print(f'done: {newest[0]}. Ask it: python inference.py --checkpoint {newest[0]} "question"')

    def quarantine(
        self,
        rollouts: tuple[Sequence[Prompt], Sequence[Completion]],
        policy: Policy,
        minibatch: Sequence[MicroBatch],
        skip: skipped_updates.SkippedUpdate,
        iteration: int,
    ) -> None:
        """Store this rank's part of a skipped update and the weights, for `python -m grpo.replay`.

        rollouts: the step's prompts and this rank's completions. A disk error causes a warning only.
        """
        step, rank = policy.counters.step + 1, self.world.rank
        folder = self.output_dir / "anomalies" / f"step_{step}"
        if not skip.losses:
            minibatch = broken_rows(*rollouts, self.cfg.num_generations, self.world.device)
        whole = not shards_weights(self.cfg)
        own_copy = whole and not all(map(math.isfinite, skip.losses))  # the weights of this rank alone may be broken
        try:
            weights = self.kept_weights.keep(
                folder, policy.weights(), policy.counters.updates, self.world.is_main or own_copy, whole
            )
            evidence = skipped_updates.Evidence(
                reason=str(skip),
                rank=rank,
                weights=weights,
                losses=[str(loss) for loss in skip.losses],
                iteration=iteration,
                trust_sampler=policy.counters.trust_sampler,
                updates=policy.counters.updates,
                entropy_coef=policy.counters.entropy_coef,
                last_entropy=policy.counters.last_entropy,
                num_tokens=policy.num_tokens,
                rows=[list(micro.rows) for micro in minibatch],
                config=dataclasses.asdict(self.cfg),
            )
            skipped_updates.quarantine(folder, evidence, minibatch)
        except (OSError, SafetensorError) as error:
            warn(f"warning: rank {rank}: {folder} could not be written: {error}")
        self.log.write_line(f"step {step}: update skipped on all ranks ({skip}); python -m grpo.replay {folder}")
