"""Saving in the background: the state is copied between two steps and written by a thread, one save at a time.

A save that fails causes a warning: existing checkpoints stay, training continues and the next due step tries again. The
run ends as failed only when its last save fails.
"""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.contents import Snapshot
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError, warn
from grpo.models.checks import is_lora
from grpo.models.lora_files import NOTHING_TRAINED, saved_line
from grpo.models.processor_files import processor_files
from grpo.runtime.heartbeat import Heartbeat
from grpo.training.policy import Policy


class Saver:
    """Writes checkpoints of one run. All ranks call its methods together."""

    def __init__(self, cfg: Config, output_dir: Path, heartbeat: Heartbeat, write_line: Callable[[str], None]):
        self.cfg = cfg
        self.output_dir = output_dir
        self.heartbeat = heartbeat
        self.write_line = write_line
        self.jobs: queue.SimpleQueue[tuple[Snapshot, Policy, bool]] = queue.SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        # Started now, while there is memory: when a thread cannot start, the caller of start() can block for ever.
        threading.Thread(target=self._work, name="saving", daemon=True).start()
        self.crash: BaseException | None = None  # raised in the thread; `wait` raises it again
        self.failure: str | None = None  # why the last save failed; None: it did not
        self.step: int | None = None  # of the newest save begun
        self.expected_s = 0.0  # duration of the last write
        self.seconds: dict[str, float] = {}  # for the next line of metrics
        self.tokenizer_files: dict[str, bytes] | None = None  # they never change: made once
        self.on_saved: Callable[[Path], None] = lambda folder: None  # called on rank 0, in the thread

    def save(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        facts: dict[str, Any],
        last: bool = False,
    ) -> None:
        """Begin to save the policy as it is now, after the previous save has ended. last: no save will follow."""
        self.wait()
        step, world = policy.counters.step, policy.world
        if policy.extras:
            began = time.monotonic()
            for extra in policy.extras.values():
                extra.gather(policy.counters)
            self.seconds["save/gather_s"] = time.monotonic() - began
        began = time.monotonic()
        self.heartbeat.saving(step, "snapshot")
        if world.is_main and self.tokenizer_files is None:
            self.tokenizer_files = serialized_tokenizer(tokenizer)
        snapshot = checkpoint.take_snapshot(step, policy, self.tokenizer_files or {}, recipe, self.cfg, facts)
        self.seconds["save/snapshot_s"] = time.monotonic() - began
        self.step = step
        self.idle.clear()
        self.jobs.put((snapshot, policy, last))
        if not self.cfg.save_in_background:
            self.wait()

    def _work(self) -> None:
        while True:
            snapshot, policy, last = self.jobs.get()
            try:
                self._write(snapshot, policy, last)
            except BaseException as error:  # an exception in a thread would be lost: `wait` raises it
                self.crash = error
            del snapshot  # frees the copy before the next save takes one
            self.idle.set()

    def _write(self, snapshot: Snapshot, policy: Policy, last: bool) -> None:
        began = time.monotonic()
        folder = self.output_dir / f"checkpoint_{snapshot.step}"
        self.failure = checkpoint.write_snapshot(
            snapshot,
            self.output_dir,
            policy.world,
            self.cfg.save_total_limit,
            lambda phase: self.heartbeat.saving(snapshot.step, phase),
        )
        self.expected_s = self.seconds["save/write_s"] = time.monotonic() - began
        if self.failure is None:
            self.write_line(f"saved {folder}")
            if policy.world.is_main and is_lora(policy.model):
                self.write_line(saved_line(folder))
            if policy.world.is_main:
                self.on_saved(folder)
        elif policy.world.is_main and not last:
            wrong = "is not written" if self.learned_nothing else "could not be written"
            warn(
                f"warning: {folder} {wrong}: {self.failure}. Earlier checkpoints are untouched; training goes on, the "
                "next save tries again."
            )

    def wait(self) -> None:
        """Wait until no save is running. Raises what the thread raised."""
        began = time.monotonic()
        if self.idle.is_set() and self.crash is None:
            return
        self.idle.wait()
        self.seconds["save/wait_s"] = self.seconds.get("save/wait_s", 0.0) + time.monotonic() - began
        if self.crash is not None:
            raise self.crash

    def finish(self) -> None:
        """Wait for the last save. Raises UserError, on every rank alike, when it failed."""
        self.wait()
        if self.failure is not None and self.learned_nothing:
            raise UserError(
                f"checkpoint: {self.output_dir}/checkpoint_{self.step} is not written: {self.failure}. "
                f"{no_gradient(self.cfg)}"
            )
        if self.failure is not None:
            raise UserError(
                f"checkpoint: {self.output_dir}/checkpoint_{self.step} could not be written: {self.failure}. Earlier "
                "checkpoints are untouched; free space or mend the folder, then run the same command to resume."
            )

    @property
    def learned_nothing(self) -> bool:
        """Whether the last save was refused because the adapter is as it was at the start."""
        return self.failure is not None and self.failure.endswith(NOTHING_TRAINED)

    def take_seconds(self) -> dict[str, float]:
        """Metrics `save/…_s`: seconds spent on saves since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def no_gradient(cfg: Config) -> str:
    """Why nothing was learned in a whole run, and what to do."""
    if cfg.sft:
        return "No gradient was other than 0: no token of a text counted, or every update was skipped. See the texts."
    return (
        "No gradient was other than 0: the completions of every question had equal rewards (reward/zero_std_groups), "
        "or every update was skipped. Change the rewards, the questions or the temperature."
    )


def serialized_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that save_pretrained writes, and those of processors beside it: relative path -> content."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        files = {
            path.relative_to(name).as_posix(): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()
        }
    return processor_files(tokenizer.name_or_path, bool(tokenizer.chat_template)) | files
