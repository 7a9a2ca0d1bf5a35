"""Saving while training goes on: a copy is taken between two steps and written by a thread, one at a time.

A save that fails costs a warning: what exists stays, training goes on and the next due step tries again. Only when
the last one fails does the run end as failed.
"""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.checkpoints import checkpoint
from grpo.checkpoints.checkpoint import Snapshot
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError, warn
from grpo.models.checks import is_lora
from grpo.models.lora_files import verdict
from grpo.runtime.heartbeat import Heartbeat
from grpo.training.policy import Policy


class Saver:
    """Writes checkpoints of one run. All ranks call its methods together."""

    def __init__(self, cfg: Config, output_dir: Path, heartbeat: Heartbeat, say: Callable[[str], None]):
        self.cfg = cfg
        self.output_dir = output_dir
        self.heartbeat = heartbeat
        self.say = say
        self.jobs: queue.SimpleQueue[tuple[Snapshot, Policy, bool]] = queue.SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        # Started now, while there is memory: a thread that cannot start can hold its starter up for ever.
        threading.Thread(target=self._work, name="saving", daemon=True).start()
        self.crash: BaseException | None = None
        self.failure: str | None = None  # why the last save failed; None: it did not
        self.step: int | None = None  # of the newest save begun
        self.expected_s = 0.0  # what the last one took
        self.seconds: dict[str, float] = {}  # for the next line of metrics
        self.tokenizer_files: dict[str, bytes] | None = None  # they never change: made once

    def save(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        facts: dict[str, Any],
        last: bool = False,
    ) -> None:
        """Begin to save the policy as it is now, after waiting for the save before it. last: none will follow."""
        self.wait()
        step, world = policy.counters.step, policy.world
        began = time.monotonic()
        self.heartbeat.saving(step, "snapshot")
        if world.is_main and self.tokenizer_files is None:
            self.tokenizer_files = files_of(tokenizer)
        snapshot = checkpoint.take(step, policy, self.tokenizer_files or {}, recipe, self.cfg, facts)
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
            except BaseException as error:  # a thread's own would be lost: `wait` raises it
                self.crash = error
            del snapshot
            self.idle.set()

    def _write(self, snapshot: Snapshot, policy: Policy, last: bool) -> None:
        began = time.monotonic()
        folder = self.output_dir / f"checkpoint_{snapshot.step}"
        self.failure = checkpoint.write(
            snapshot,
            self.output_dir,
            policy.world,
            self.cfg.save_total_limit,
            lambda phase: self.heartbeat.saving(snapshot.step, phase),
        )
        self.expected_s = self.seconds["save/write_s"] = time.monotonic() - began
        if self.failure is None:
            self.say(f"saved {folder}")
            if policy.world.is_main and is_lora(policy.model):
                self.say(verdict(folder))
        elif policy.world.is_main and not last:
            warn(
                f"warning: {folder} could not be written: {self.failure}. Earlier checkpoints are untouched; "
                "training goes on, the next save tries again."
            )

    def wait(self) -> None:
        """Until no save is in flight. Raises what the thread raised."""
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
        if self.failure is not None:
            raise UserError(
                f"checkpoint: {self.output_dir}/checkpoint_{self.step} could not be written: {self.failure}. Earlier "
                "checkpoints are untouched; free space or mend the folder, then run the same command to resume."
            )

    def take_seconds(self) -> dict[str, float]:
        """What saves have cost since the last call, for the log."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """What save_pretrained would write, by name."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        return {
            path.relative_to(name).as_posix(): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()
        }
