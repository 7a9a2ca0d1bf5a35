"""Checkpoints: output_dir/checkpoint_N, a Hugging Face folder that plain transformers opens.

    checkpoint_N/
      model.safetensors, config.json, tokenizer files     AutoModelForCausalLM.from_pretrained opens these
      trainer/optimizer-R-of-W.safetensors                moments by parameter name, fp32, one share a rank
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import Policy
from grpo.prompts import Recipe, save_recipe

NAME = re.compile(r"checkpoint_(\d+)")
MANIFEST = "MANIFEST.json"


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
    """Write checkpoint_{step} aside, all ranks together, and commit it by one rename on rank 0.

    Rank 0 writes the model, every rank its share of the optimizer state. Raises UserError, on every rank alike,
    when a disk refuses; what existed before stays.
    """
    world = policy.world
    final = output_dir / f"checkpoint_{step}"
    aside = output_dir / f".tmp-checkpoint_{step}"
    error = ""
    try:
        (aside / "trainer").mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        error = str(refused)
    # Streaming the weights is a collective for sharded backends: every rank goes through it, whatever its disk said.
    weights = {name: tensor.cpu() for name, tensor in policy.weights() if world.is_main}
    try:
        save_file(
            {f"{p.name}|{p.moment}|{p.start}": p.values.cpu().contiguous() for p in policy.backend.moments()},
            aside / "trainer" / f"optimizer-{world.rank:05d}-of-{world.size:05d}.safetensors",
        )
        if world.is_main:
            _save_model(policy, weights, aside)
            tokenizer.save_pretrained(aside)
            save_recipe(recipe, aside / "trainer" / "recipe.json")
            state = {"counters": dataclasses.asdict(policy.counters), "config": dataclasses.asdict(cfg), **facts}
            (aside / "trainer" / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as refused:
        error = error or str(refused)
    (failed,) = world.any_rank(bool(error))
    if not failed and world.is_main:
        try:
            _commit(aside, final, step)
            _prune(output_dir, cfg.save_total_limit)
        except OSError as refused:
            error = str(refused)
    (failed,) = world.any_rank(bool(error))
    if failed:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint: {final} could not be written: {error or 'see the other ranks'}. Earlier checkpoints are "
            "untouched; free space or choose another --output_dir, then run the same command to resume."
        )
    return final


def _save_model(policy: Policy, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """save_pretrained from streamed weights: tied and untrained tensors come from the model itself."""
    whole = {name: weights.get(name, tensor) for name, tensor in policy.model.state_dict().items()}
    tied = {name: weights[source] for name, source in _tied_names(policy.model).items() if source in weights}
    policy.model.save_pretrained(folder, state_dict=whole | tied)


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Name of each parameter that is another's alias -> the name it is listed under."""
    first: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


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
        os.rename(final, unused(final.with_name(f"damaged-{final.name}")))
    os.rename(aside, final)  # the commit
    _sync(final.parent)


def unused(path: Path) -> Path:
    """This path, or the first of path-2, path-3, … that nothing stands at."""
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


def make_output(output_dir: Path) -> None:
    """Make the folder and prove that it can be written. Raises UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error}. Choose another --output_dir.") from None


def prepare_output(output_dir: Path, resume: str) -> None:
    """Sweep what dead runs left; with resume never, set their checkpoints aside. Raises UserError."""
    try:
        for junk in [*output_dir.glob(".tmp-checkpoint_*"), *output_dir.glob(".trash-*")]:
            shutil.rmtree(junk, ignore_errors=True)
        if resume == "never" and checkpoints(output_dir):
            previous = unused(output_dir / "previous")
            previous.mkdir()
            for folder in checkpoints(output_dir):
                os.rename(folder, previous / folder.name)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error}. Choose another --output_dir.") from None


def tree_sha256(path: Path) -> str:
    """Fingerprint of a file, or of every file in a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _files(path):
        digest.update(f"{file.relative_to(path.parent)}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()
