"""Checkpoints: output_dir/checkpoint_N, a Hugging Face folder that plain transformers or peft opens.

    checkpoint_N/
      model.safetensors, config.json, tokenizer files     AutoModelForCausalLM.from_pretrained opens these; with LoRA
                                                          adapter_model.safetensors, adapter_config.json: plain peft
      trainer/optimizer-R-of-W.safetensors                moments by parameter name, fp32, one shard per rank
      trainer/state.json                                  counters, config, fingerprints, versions
      trainer/recipe.json                                 how prompts are built (grpo/data/recipe.py)
      trainer/NAME.safetensors                            what some settings need beside these (Policy.extras)
      MANIFEST.json                                       size and sha256 of every file; written last

Everything is written into a staging folder, synced to disk, and committed by one rename. A reader accepts a folder
only when its manifest matches, so a half-written or damaged checkpoint is never used. No pickle is written or read.
"""

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from grpo.checkpoints.best import best_name
from grpo.checkpoints.manifest import CHECKPOINT_NAME, OPTIMIZER, sync, verify, write_manifest
from grpo.config.settings import Config
from grpo.data.recipe import Recipe, recipe_text
from grpo.errors import UserError
from grpo.models.checks import is_lora
from grpo.models.lora_files import write_adapter
from grpo.runtime.distributed import World
from grpo.training.policy import Policy


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders named checkpoint_N, newest first, valid or not."""
    found = [path for path in output_dir.glob("checkpoint_*") if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """N of checkpoint_N.

    >>> step_of(Path("output/checkpoint_20"))
    20
    """
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def newest_valid(output_dir: Path, notice: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest matches; each damaged one is skipped with a notice that names it."""
    for folder in checkpoint_folders(output_dir):
        problem = verify(folder)
        if problem is None:
            return folder
        notice(f"{folder} is not used: {problem}")
    return None


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training state: training may continue while it is written."""

    step: int
    model: PreTrainedModel  # its class and config; the weights are below
    weights: dict[str, torch.Tensor]  # rank 0: the whole state dict (or the adapter) on CPU; other ranks: empty
    moments: dict[str, torch.Tensor]  # this rank's shard of the optimizer state, on CPU
    files: dict[str, bytes]  # rank 0: path -> content of the other files
    extras: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # rank 0: Policy.extras by name

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole checkpoint, over all ranks: moments are twice the weights. Valid on rank 0 only."""
        unique = {id(tensor): tensor for tensor in self.weights.values()}  # tied weights have several names
        weights = sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
        extras = sum(tensor.nbytes for tensors in self.extras.values() for tensor in tensors.values())
        return weights * (3 if self.moments else 1) + extras


def take_snapshot(
    step: int, policy: Policy, tokenizer_files: dict[str, bytes], recipe: Recipe, cfg: Config, facts: dict[str, Any]
) -> Snapshot:
    """Copy what checkpoint_{step} needs. Every rank must call it: gathering sharded weights is a collective."""
    is_main = policy.world.is_main
    streamed = {name: tensor.to("cpu", copy=True) for name, tensor in policy.weights() if is_main}
    moments = {f"{p.name}|{p.moment}|{p.start}": p.values.to("cpu", copy=True) for p in policy.backend.moments()}
    if not is_main:
        return Snapshot(step, policy.model, {}, moments, {})
    state = {"counters": dataclasses.asdict(policy.counters), "config": dataclasses.asdict(cfg), **facts}
    files = {
        "trainer/state.json": (json.dumps(state, indent=2) + "\n").encode(),
        "trainer/recipe.json": recipe_text(recipe).encode(),
    }
    weights = streamed if is_lora(policy.model) else _full_state_dict(policy.model, streamed)
    extras = {name: extra.tensors() for name, extra in policy.extras.items()}
    return Snapshot(step, policy.model, weights, moments, tokenizer_files | files, extras)


def write_snapshot(
    snapshot: Snapshot, output_dir: Path, world: World, limit: int | None, on_phase: Callable[[str], None]
) -> str | None:
    """Write checkpoint_{step} into a staging folder, all ranks together; rank 0 commits it by one rename.

    Rank 0 writes the model, every rank its shard of the optimizer state. Returns None on success. On failure every rank
    returns a reason, or that another rank failed; existing checkpoints stay. May run in a background thread: its
    collectives use a process group of their own. `on_phase` is called with the name of each phase.
    """
    final = output_dir / f"checkpoint_{snapshot.step}"
    staging = output_dir / f".tmp-checkpoint_{snapshot.step}"
    problem = ""
    # every rank writes its files
    try:
        on_phase("write")
        if world.is_main:
            _check_space(snapshot, output_dir)
        (staging / "trainer").mkdir(parents=True, exist_ok=True)
        shard = staging / "trainer" / _shard_name(world.rank, world.size)
        save_file({name: values.contiguous() for name, values in snapshot.moments.items()}, shard)
        sync(shard)  # by the rank that wrote it: on a network disk no other rank can
        if world.is_main:
            problem = _write_model(snapshot, staging)
            for name, tensors in snapshot.extras.items():
                save_file(tensors, staging / "trainer" / f"{name}.safetensors")
            for name, content in snapshot.files.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_bytes(content)
        on_phase("written")
    except (OSError, SafetensorError) as error:
        problem = str(error)
    # rank 0 commits when no rank failed
    (failed,) = world.any_rank(bool(problem), background=True)
    if not failed and world.is_main:
        try:
            _await_shards(staging, world.size)
            _commit(staging, final, snapshot.step, on_phase)
            on_phase("prune")
            _prune(output_dir, limit, final)
        except OSError as error:
            problem = str(error)
    # all ranks return the same outcome
    (failed,) = world.any_rank(bool(problem), background=True)
    if not failed:
        return None
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
    return problem or "another rank could not write"


def _write_model(snapshot: Snapshot, staging: Path) -> str:
    """Write the model's files, or its adapter's. Returns what is wrong with them, or an empty string."""
    if not is_lora(snapshot.model):
        snapshot.model.save_pretrained(staging, state_dict=snapshot.weights)
        return ""
    problem = write_adapter(cast(Any, snapshot.model).lora_config.to_dict(), snapshot.weights.items(), staging)
    return f"the adapter is refused, {problem}" if problem else ""


def _check_space(snapshot: Snapshot, output_dir: Path) -> None:
    free = shutil.disk_usage(output_dir).free
    if free < snapshot.num_bytes:
        raise OSError(errno.ENOSPC, f"{snapshot.num_bytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


def _shard_name(rank: int, world_size: int) -> str:
    return f"{OPTIMIZER}{rank:05d}-of-{world_size:05d}.safetensors"


def _await_shards(staging: Path, world_size: int, wait_s: float = 30.0) -> None:
    """A network disk may show rank 0 the other ranks' files a little late."""
    deadline = time.monotonic() + wait_s
    expected = {_shard_name(rank, world_size) for rank in range(world_size)}
    while missing := expected - {path.name for path in (staging / "trainer").iterdir()}:
        if time.monotonic() > deadline:
            raise OSError(errno.ENOENT, f"{sorted(missing)[0]} did not appear within {wait_s:.0f} s")
        time.sleep(0.2)


def _full_state_dict(model: PreTrainedModel, streamed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state dict from gathered weights: tied tensors under all their names, buffers from the model."""
    tied = {name: streamed[source] for name, source in _tied_names(model).items() if source in streamed}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in streamed and name not in tied}
    return streamed | tied | {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Name of each tied parameter -> the name that named_parameters() lists it under."""
    first: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    all_names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in all_names if first[id(parameter)] != name}


def _commit(staging: Path, final: Path, step: int, on_phase: Callable[[str], None]) -> None:
    on_phase("manifest")
    write_manifest(staging, step)
    on_phase("rename")
    if final.exists():  # a damaged checkpoint of the same step: keep it under another name
        os.rename(final, unused_path(final.with_name(f"damaged-{final.name}")))
    os.rename(staging, final)  # the commit
    sync(final.parent)
    on_phase("committed")


def unused_path(path: Path) -> Path:
    """This path, or the first of path-2, path-3, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _prune(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Keep the `limit` newest valid checkpoints, `newest` being the one just written, and the best one."""
    if limit is None:
        return
    num_valid, best = 0, best_name(output_dir)
    for folder in checkpoint_folders(output_dir):
        if num_valid >= limit and folder.name != best:
            trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
            os.rename(folder, trash)  # one rename, so that no reader sees half of it
            shutil.rmtree(trash, ignore_errors=True)
        elif folder == newest or verify(folder) is None:
            num_valid += 1


def make_output(output_dir: Path) -> None:
    """Make the folder and check that it can be written. Raises UserError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error}. Choose another --output_dir.") from None


def prepare_output(output_dir: Path, resume: str) -> None:
    """Remove temporary folders of earlier runs; with resume never, set checkpoints aside. Raises UserError."""
    try:
        for pattern in (".tmp-checkpoint_*", ".trash-*", ".push-*"):
            for leftover in output_dir.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        if resume == "never" and checkpoint_folders(output_dir):
            previous = unused_path(output_dir / "previous")
            previous.mkdir()
            for folder in checkpoint_folders(output_dir):
                os.rename(folder, previous / folder.name)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error}. Choose another --output_dir.") from None
