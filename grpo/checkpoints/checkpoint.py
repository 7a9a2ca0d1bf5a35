"""Checkpoints: output_dir/checkpoint_N, a Hugging Face folder that plain transformers or peft opens.

    checkpoint_N/
      model.safetensors, config.json, tokenizer files     AutoModelForCausalLM.from_pretrained opens these; with LoRA
                                                          adapter_model.safetensors, adapter_config.json: plain peft
      trainer/optimizer-R-of-W.safetensors                moments by parameter name, fp32, one share a rank
      trainer/state.json                                  counters, config, fingerprints, versions
      trainer/recipe.json                                 how prompts are put (grpo/data/recipe.py)
      MANIFEST.json                                       size and sha256 of every file; written last

Everything is written into a folder aside, synced to disk, and committed by one rename. A reader takes a
folder for a checkpoint only when its manifest holds, so a half-written or damaged one is never used. No
pickle is written or read.
"""

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from grpo.checkpoints.best import best_name
from grpo.checkpoints.manifest import NAME, sync, verify, write_manifest
from grpo.config.settings import Config
from grpo.data.recipe import Recipe, recipe_text
from grpo.errors import UserError
from grpo.models.checks import is_lora
from grpo.models.lora_files import write_adapter
from grpo.runtime.distributed import World
from grpo.training.policy import Policy


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


@dataclass(frozen=True)
class Snapshot:
    """A moment of training, copied: training may go on while it is written."""

    step: int
    model: PreTrainedModel  # its class and config; the weights are below
    weights: dict[str, torch.Tensor]  # rank 0: the whole state dict (or the adapter) on CPU; other ranks: nothing
    moments: dict[str, torch.Tensor]  # this rank's share of the optimizer state, on CPU
    files: dict[str, bytes]  # rank 0: what else belongs into the folder, by path

    @property
    def num_bytes(self) -> int:
        """Of the whole checkpoint, over all ranks: moments are twice the weights. Known to rank 0."""
        once = {id(tensor): tensor for tensor in self.weights.values()}  # tied weights have several names
        weights = sum(tensor.numel() * tensor.element_size() for tensor in once.values())
        return weights * (3 if self.moments else 1)


def take(
    step: int, policy: Policy, tokenizer_files: dict[str, bytes], recipe: Recipe, cfg: Config, facts: dict[str, Any]
) -> Snapshot:
    """Copy what checkpoint_{step} needs. Every rank must call it: streaming sharded weights is a collective."""
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
    weights = streamed if is_lora(policy.model) else _whole(policy.model, streamed)
    return Snapshot(step, policy.model, weights, moments, tokenizer_files | files)


def write(
    snapshot: Snapshot, output_dir: Path, world: World, limit: int | None, note: Callable[[str], None]
) -> str | None:
    """Write checkpoint_{step} aside, all ranks together, and commit it by one rename on rank 0.

    Rank 0 writes the model, every rank its share of the optimizer state. Returns None, or on every rank alike
    that it failed, and why (as far as this rank knows); what existed before stays. May run in a thread of its own:
    its collectives have their own group. `note` hears how far it is.
    """
    final = output_dir / f"checkpoint_{snapshot.step}"
    aside = output_dir / f".tmp-checkpoint_{snapshot.step}"
    error = ""
    try:
        note("write")
        if world.is_main:
            _check_space(snapshot, output_dir)
        (aside / "trainer").mkdir(parents=True, exist_ok=True)
        share = aside / "trainer" / _share(world.rank, world.size)
        save_file({name: values.contiguous() for name, values in snapshot.moments.items()}, share)
        sync(share)  # by the rank that wrote it: on a network disk nobody else can
        if world.is_main:
            error = _write_model(snapshot, aside)
            for name, content in snapshot.files.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(content)
        note("written")
    except (OSError, SafetensorError) as refused:
        error = str(refused)
    (failed,) = world.any_rank(bool(error), background=True)
    if not failed and world.is_main:
        try:
            _await_shares(aside, world.size)
            _commit(aside, final, snapshot.step, note)
            note("prune")
            _prune(output_dir, limit, final)
        except OSError as refused:
            error = str(refused)
    (failed,) = world.any_rank(bool(error), background=True)
    if not failed:
        return None
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
    return error or "another rank could not write"


def _write_model(snapshot: Snapshot, aside: Path) -> str:
    """The model's files, or its adapter's. Returns what is wrong with them, or nothing."""
    if not is_lora(snapshot.model):
        snapshot.model.save_pretrained(aside, state_dict=snapshot.weights)
        return ""
    problem = write_adapter(cast(Any, snapshot.model).lora_config.to_dict(), snapshot.weights.items(), aside)
    return f"the adapter is refused, {problem}" if problem else ""


def _check_space(snapshot: Snapshot, output_dir: Path) -> None:
    free = shutil.disk_usage(output_dir).free
    if free < snapshot.num_bytes:
        raise OSError(errno.ENOSPC, f"{snapshot.num_bytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


def _share(rank: int, world_size: int) -> str:
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def _await_shares(aside: Path, world_size: int, wait_s: float = 30.0) -> None:
    """A network disk may show rank 0 the other ranks' files a little late."""
    deadline = time.monotonic() + wait_s
    wanted = {_share(rank, world_size) for rank in range(world_size)}
    while missing := wanted - {path.name for path in (aside / "trainer").iterdir()}:
        if time.monotonic() > deadline:
            raise OSError(errno.ENOENT, f"{sorted(missing)[0]} did not appear within {wait_s:.0f} s")
        time.sleep(0.2)


def _whole(model: PreTrainedModel, streamed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state dict from streamed weights: tied tensors by all their names, buffers from the model itself."""
    tied = {name: streamed[source] for name, source in _tied_names(model).items() if source in streamed}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in streamed and name not in tied}
    return streamed | tied | {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Name of each parameter that is another's alias -> the name it is listed under."""
    first: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _commit(aside: Path, final: Path, step: int, note: Callable[[str], None]) -> None:
    note("manifest")
    write_manifest(aside, step)
    note("rename")
    if final.exists():  # a damaged one of the same step: keep it, out of the way
        os.rename(final, unused(final.with_name(f"damaged-{final.name}")))
    os.rename(aside, final)  # the commit
    sync(final.parent)
    note("committed")


def unused(path: Path) -> Path:
    """This path, or the first of path-2, path-3, … that nothing stands at."""
    taken, number = path, 1
    while taken.exists():
        number += 1
        taken = path.with_name(f"{path.name}-{number}")
    return taken


def _prune(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Keep the `limit` newest valid checkpoints, of which `newest` has just been written, and the best one."""
    if limit is None:
        return
    num_valid, best = 0, best_name(output_dir)
    for folder in checkpoints(output_dir):
        if num_valid >= limit and folder.name != best:
            trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
            os.rename(folder, trash)  # one step, so that no reader meets half of it
            shutil.rmtree(trash, ignore_errors=True)
        elif folder == newest or verify(folder) is None:
            num_valid += 1


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
