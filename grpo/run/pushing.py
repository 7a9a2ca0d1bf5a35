"""push_to_hub: each checkpoint is sent to the hub while training goes on. A failure is a warning and nothing else.

A checkpoint that is complete is linked into a folder of its own, so that `save_total_limit` may remove it meanwhile:
the model's files, the tokenizer, the prompt recipe, the settings without this machine's paths, a manifest, and the
model card of grpo.export; neither optimizer state nor a reference. A process at the lowest priority sends the folder in
one commit (grpo/models/upload.py): a hub that is slow or hangs holds a socket of that process and nothing of the
trainer, and the kernel ends it with the trainer. One push at a time; of the checkpoints saved meanwhile the newest is
next.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub

from grpo.checkpoints.card import card_text, read_metrics, without_paths
from grpo.checkpoints.contents import step_of
from grpo.checkpoints.manifest import MANIFEST, file_sha256, manifest_text
from grpo.config.names import find_path
from grpo.config.settings import PROJECT, Config
from grpo.errors import UserError, warn
from grpo.models.lora_checks import is_adapter
from grpo.models.lora_files import base_of
from grpo.models.upload import find_token
from grpo.strict_json import read_object

PREFIX = ".push-"  # of the folder that is sent; prepare_output removes what a killed run leaves
POLL_S = 0.2  # of the wait at the end of a run
END_S = 5.0  # for the thread to end after its process was killed
STATE = "trainer/state.json"


def check_push(cfg: Config) -> None:
    """Refuse, before anything is trained, what could never be sent. Without network. Raises UserError."""
    if cfg.push_to_hub is None:
        return
    if huggingface_hub.constants.is_offline_mode():
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so nothing could be sent. Unset it, or leave it out.")
    find_token("push_to_hub")
    if cfg.lora_r and cfg.model is not None:
        path = find_path(cfg.model)
        base = base_of(path) if path is not None and is_adapter(path) else cfg.model
        if find_path(base) is not None:
            raise UserError(
                f"push_to_hub: an adapter names its base, here {base}, a folder of this machine, which other machines "
                "lack. Train on the base by its hub name, or push afterwards: python -m grpo.export --to merged_16bit."
            )


def stage(folder: Path, staged: Path, config: dict[str, Any]) -> None:
    """Link what is sent of a checkpoint into a folder. Raises OSError, or KeyError or ValueError for no checkpoint."""
    shutil.rmtree(staged, ignore_errors=True)
    listed = dict(read_object(folder / MANIFEST)["files"])
    kept_here = re.compile(r"trainer/.*\.safetensors")  # for resuming, on this machine
    files = {name: entry for name, entry in listed.items() if not kept_here.fullmatch(name)}
    for name in files:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if name == STATE:
            continue
        try:
            os.link(folder / name, staged / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / name, staged / name)
    state = {**read_object(folder / STATE), "config": without_paths(config)}
    (staged / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    files[STATE] = {"bytes": (staged / STATE).stat().st_size, "sha256": file_sha256(staged / STATE)}
    (staged / MANIFEST).write_text(manifest_text(step_of(folder), files), encoding="utf-8")


def add_card(staged: Path, step: int, config: dict[str, Any]) -> None:
    """Write README.md. Raises OSError."""
    try:
        metrics = read_metrics(config, step)
    except UserError:  # a damaged metrics.jsonl: the card is without a curve
        metrics = []
    form = "lora" if is_adapter(staged) else "checkpoint"
    (staged / "README.md").write_text(card_text(without_paths(config), step, [form], metrics), encoding="utf-8")


class Pusher:
    """Sends the checkpoints of one run. For rank 0, and only where `push_to_hub` is set."""

    def __init__(self, cfg: Config, config: dict[str, Any], output_dir: Path, write_line: Callable[[str], None]):
        """config: the settings as a dictionary."""
        assert cfg.push_to_hub is not None
        self.repo, self.limit_s, self.config = cfg.push_to_hub, cfg.push_timeout_s, config
        self.output_dir, self.write_line = output_dir, write_line
        self.changed = threading.Condition()  # guards what follows
        self.next: Path | None = None  # a staged folder
        self.process: subprocess.Popen | None = None
        self.busy = False
        self.newest = ""  # name of the checkpoint saved last
        self.told = ""  # of the one whose failure has been said
        self.stopped = False  # nothing is begun or said any more
        threading.Thread(target=self._work, name="pushing", daemon=True).start()

    def saved(self, folder: Path) -> None:
        """A checkpoint is complete: it is sent next. Raises nothing."""
        self.newest, self.told = folder.name, ""
        staged = folder.with_name(PREFIX + folder.name)
        try:
            stage(folder, staged, self.config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._failed(folder.name, f"its files could not be linked ({error})")
            return
        with self.changed:
            if self.next is not None:
                shutil.rmtree(self.next, ignore_errors=True)
            self.next = staged
            self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.next is not None)
                staged, self.next, self.busy = self.next, None, True
            assert staged is not None
            name = staged.name.removeprefix(PREFIX)
            try:
                problem = self._push(staged, int(name.rpartition("_")[2]))
            except (OSError, ValueError) as error:
                problem = str(error)
            if problem is None and not self.stopped:
                self.write_line(f"pushed {name} to {self.repo}")
            elif problem is not None:
                self._failed(name, problem)
            shutil.rmtree(staged, ignore_errors=True)
            with self.changed:
                self.busy = False
                self.changed.notify_all()

    def _push(self, staged: Path, step: int) -> str | None:
        """Send a staged folder. Returns why it was not sent; None when it was. Raises OSError, ValueError."""
        add_card(staged, step, self.config)
        with self.changed:
            if self.stopped:
                return "the run ends"
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo.models.upload"],
                cwd=PROJECT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,  # stays open: its end is the process's end
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            job = {"folder": str(staged.absolute()), "repo": self.repo, "message": f"Step {step}"}
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            process.wait(self.limit_s)
            reply = json.loads(process.stdout.readline() or b'{"error": "its process was killed"}')
            return None if "sent" in reply else str(reply["error"])
        except subprocess.TimeoutExpired:
            return f"it took longer than push_timeout_s {self.limit_s:g}"
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            process.wait()

    def _failed(self, name: str, problem: str) -> None:
        """Say it once: a push that has just failed when `finish` gives up would be told of by both threads."""
        with self.changed:
            silent, self.told = self.stopped or self.told == name, name
        if not silent:
            warn(
                f"warning: push_to_hub: {name} was not sent to {self.repo}: {problem}. The checkpoint is whole; the "
                f"next save tries again, or: python -m grpo.export --checkpoint {self.output_dir / name} --to "
                f"merged_16bit --out exported --push {self.repo}"
            )

    def finish(self, go_on: Callable[[], bool]) -> None:
        """Wait for what is under way, at most push_timeout_s. go_on: called often; False ends the wait."""
        deadline = time.monotonic() + self.limit_s
        with self.changed:
            while (self.busy or self.next is not None) and go_on():
                if time.monotonic() > deadline:
                    break
                self.changed.wait(POLL_S)
            late = self.busy or self.next is not None
        if late:
            self._failed(self.newest, f"not within push_timeout_s {self.limit_s:g}, and the run has ended")
        self.stop()

    def stop(self) -> None:
        """End a push that is under way, and begin no other."""
        with self.changed:
            self.stopped = True
            if self.process is not None:
                self.process.kill()
            if self.next is not None:
                shutil.rmtree(self.next, ignore_errors=True)
                self.next = None
            self.changed.wait_for(lambda: not self.busy, END_S)
