"""Checkpoints: output_dir/checkpoint_N, a Hugging Face folder that plain transformers opens.

    checkpoint_N/
      model.safetensors, config.json, tokenizer files     AutoModelForCausalLM.from_pretrained opens these
      trainer/optimizer.safetensors                       moments by parameter name, fp32
      trainer/state.json                                  counters, config, fingerprints, versions
      trainer/recipe.json                                 how prompts are put (grpo/prompts.py)
      MANIFEST.json                                       size and sha256 of every file; written last

Everything is written into a folder aside, synced to disk, and committed by one rename. A reader takes a
folder for a checkpoint only when its manifest holds, so a half-written or damaged one is never used. No
pickle is written or read.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import Policy
from grpo.prompts import Recipe, save_recipe
from grpo.types import Counters

NAME = re.compile(r"checkpoint_(\d+)")
MANIFEST = "MANIFEST.json"
FREE_TO_CHANGE = {  # settings that do not change what is trained; all others must match on resume
    "output_dir", "save_steps", "save_total_limit", "resume", "runs_dir", "run_name", "report_to",
    "log_samples_steps", "eval_data", "eval_split", "eval_rows", "eval_steps", "num_threads", "device",
    "micro_batch_tokens", "rollout_chunk_rows", "logits_chunk_mb", "gradient_checkpointing", "max_bad_steps",
    "max_reward_failures", "inference_questions",
}  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(folder: Path) -> str | None:
    """Why a folder is no valid checkpoint, naming the file; None when it is one."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except OSError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, sha256) in expected.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink() or path.parent.is_symlink():
            return f"{name} points elsewhere"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
        if _sha256(path) != sha256:
            return f"{name} does not match its sha256"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint_N, newest first, valid or not."""
    found = [path for path in output_dir.glob("checkpoint_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """N of checkpoint_N.

    >>> step_of(Path("output/checkpoint_20"))
    20
    """
    match = NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def newest_valid(output_dir: Path, notice: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are named in a notice and passed over."""
    for folder in checkpoints(output_dir):
        problem = verify(folder)
        if problem is None:
            return folder
        notice(f"{folder} is not used: {problem}")
    return None


def save(
    output_dir: Path, step: int, policy: Policy, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, cfg: Config,
    facts: dict[str, Any],
) -> Path:  # fmt: skip
    """Write checkpoint_{step} aside and commit it by one rename. Called on the rank that writes.

    Raises UserError when the disk refuses; what existed before stays.
    """
    final = output_dir / f"checkpoint_{step}"
    aside = output_dir / f".tmp-checkpoint_{step}-{os.getpid()}"
    try:
        (aside / "trainer").mkdir(parents=True)
        policy.model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        optimizer = {name: tensor.cpu().contiguous() for name, tensor in policy.backend.optimizer_state().items()}
        save_file(optimizer, aside / "trainer" / "optimizer.safetensors")
        save_recipe(recipe, aside / "trainer" / "recipe.json")
        state = {"counters": dataclasses.asdict(policy.counters), "config": dataclasses.asdict(cfg), **facts}
        (aside / "trainer" / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _commit(aside, final, step)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint: {final} could not be written: {error}. Earlier checkpoints are untouched; "
            "free space or choose another --output_dir, then run the same command to resume."
        ) from None
    _prune(output_dir, cfg.save_total_limit)
    return final


def _commit(aside: Path, final: Path, step: int) -> None:
    files = {}
    for path in _files(aside):
        _sync(path)
        files[path.relative_to(aside).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (manifest, aside / "trainer", aside):
        _sync(path)
    if final.exists():  # a damaged one of the same step: keep it, out of the way
        os.rename(final, _unused(final.with_name(f"damaged-{final.name}")))
    os.rename(aside, final)  # the commit
    _sync(final.parent)


def _unused(path: Path) -> Path:
    taken, number = path, 1
    while taken.exists():
        number += 1
        taken = path.with_name(f"{path.name}-{number}")
    return taken


def _prune(output_dir: Path, limit: int | None) -> None:
    if limit is None:
        return
    valid = [folder for folder in checkpoints(output_dir) if verify(folder) is None]
    for folder in valid[limit:]:
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
        os.rename(folder, trash)  # one step, so that no reader meets half of it
        shutil.rmtree(trash, ignore_errors=True)


def prepare_output(output_dir: Path, resume: str) -> None:
    """Make the folder, prove that it can be written, sweep what dead runs left. Raises UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        for junk in [*output_dir.glob(".tmp-checkpoint_*"), *output_dir.glob(".trash-*")]:
            shutil.rmtree(junk, ignore_errors=True)
        if resume == "never" and checkpoints(output_dir):
            previous = _unused(output_dir / "previous")
            previous.mkdir()
            for folder in checkpoints(output_dir):
                os.rename(folder, previous / folder.name)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error}. Choose another --output_dir.") from None


def read_state(folder: Path) -> dict[str, Any]:
    """trainer/state.json of a checkpoint. Raises UserError."""
    try:
        state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
        return {**state, "counters": Counters(**state["counters"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint: {folder} has no usable trainer/state.json ({error}). Use --resume never."
        ) from None


def check_same_run(folder: Path, state: dict[str, Any], cfg: Config, facts: dict[str, Any]) -> None:
    """Refuse to resume when something would change the trajectory. Raises UserError naming the difference."""
    free = set(FREE_TO_CHANGE)
    if cfg.lr_schedule == "constant" and not cfg.warmup_ratio:
        free |= {"max_steps", "epoch"}  # the rate does not depend on the run's length: it may be extended
    before, now = {**state["config"]}, dataclasses.asdict(cfg)
    differences = [
        f"{key}: {before.get(key)!r} there, {now[key]!r} now"
        for key in now
        if key not in free and before.get(key) != now[key]
    ]
    differences += [f"{key} has changed" for key in facts if key != "versions" and state.get(key) != facts[key]]
    if differences:
        raise UserError(
            f"resume: {folder} was trained with other settings ({'; '.join(differences[:3])}). Use the same ones, "
            "another --output_dir, or --resume never, which sets the old checkpoints aside."
        )


def load_into(policy: Policy, folder: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint's weights, moments and counters into the policy. Raises UserError."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    weights = loaded.state_dict()
    own = policy.model.state_dict()
    if set(weights) != set(own) or any(weights[name].shape != own[name].shape for name in own):
        raise UserError(f"checkpoint: the weights in {folder} do not fit the model. Use --resume never.")
    policy.model.load_state_dict(weights)
    policy.backend.load_optimizer_state(load_file(folder / "trainer" / "optimizer.safetensors"))
    policy.counters = state["counters"]


def tree_sha256(path: Path) -> str:
    """Fingerprint of a file, or of every file in a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _files(path):
        digest.update(f"{file.relative_to(path.parent)}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()
