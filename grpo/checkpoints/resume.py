"""Continuing from a checkpoint: the same run or a refusal; weights, moments and counters are restored exactly.

The optimizer state is read in pieces, by parameter name and offset, so any backend on any number of ranks can read what
another one wrote.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from grpo.checkpoints.fingerprints import INFORMATIVE
from grpo.checkpoints.manifest import OPTIMIZER
from grpo.config.names import with_new_names
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.folder_checks import TRAINABLE, check_safetensors
from grpo.strict_json import read_object
from grpo.training.policy import Policy
from grpo.types import Counters

FREE_TO_CHANGE = {  # settings that do not change what is trained; all others must match on resume
    "algorithm",  # what it fills in is compared
    "output_dir",
    "save_steps",
    "save_total_limit",
    "resume",
    "runs_dir",
    "run_name",
    "report_to",
    "log_samples_steps",
    "log_completions_steps",
    "log_tokens_steps",
    "log_tokens_mb",
    "console_language",
    "quiet",
    "tracker_project",
    "tracker_mode",
    "eval_data",
    "eval_split",
    "eval_rows",
    "eval_steps",
    "eval_generations",
    "num_threads",
    "device",
    "micro_batch_tokens",
    "rollout_chunk_rows",
    "rollout_tokens",
    "rollout_server",
    "rollout_transfer",
    "rollout_timeout_s",
    "max_sampler_gap",
    "vllm_args",
    "cuda_graphs",
    "logits_chunk_mb",
    "gradient_checkpointing",
    "max_bad_steps",
    "max_reward_failures",
    "inference_questions",
    "backend",
    "zero_stage",
    "offload",
    "deepspeed_config",
    "activation_offload",
    "reference_offload",
    "save_in_background",
    "push_to_hub",
    "push_timeout_s",
    "check_weights_steps",
    "stall_timeout_s",
    "preempt_grace_s",
    "reward_workers",
    "reward_timeout_s",
    "reward_memory_mb",
}


def read_state(folder: Path) -> dict[str, Any]:
    """trainer/state.json of a checkpoint. Raises UserError."""
    try:
        state = read_object(folder / "trainer" / "state.json")
        if not isinstance(state["config"], dict):
            raise ValueError("config must be an object")
        counters = Counters(**state["counters"])
        if "drawn" not in state["counters"]:  # an older version: every step drew P
            batch = {**dataclasses.asdict(Config()), **state["config"]}
            counters.drawn = counters.step * batch["batch_size"] * batch["gradient_accumulation_steps"]
        for name, value in vars(counters).items():
            if name == "trust_sampler":
                if not (value is None or isinstance(value, bool)):
                    raise ValueError(f"counters: {name} must be true, false or null, got {value!r}")
            elif name in ("entropy_coef", "last_entropy"):
                if not (value is None or (type(value) in (int, float) and 0 <= value < math.inf)):
                    raise ValueError(f"counters: {name} must be a finite number >= 0 or null, got {value!r}")
            elif type(value) is not int or not 0 <= value < 2**62:
                raise ValueError(f"counters: {name} must be a whole number >= 0, got {value!r}")
        return {**state, "counters": counters, "config": with_new_names(state["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint: {folder} has no usable trainer/state.json ({error}). Use --resume never."
        ) from None


def check_same_run(folder: Path, state: dict[str, Any], cfg: Config, facts: dict[str, Any]) -> None:
    """Refuse to resume when a difference would change the trajectory. Raises UserError naming the difference."""
    free = set(FREE_TO_CHANGE)
    if cfg.lr_schedule in ("constant", "constant_with_warmup") and not cfg.warmup_ratio:
        free |= {"max_steps", "epoch"}  # the rate does not depend on the run's length: it may be extended
    commits = state.get("model_commit"), facts.get("model_commit")
    if commits[0] is not None and commits[0] == commits[1]:
        free.add("model_revision")  # two names of one commit
    saved = {**dataclasses.asdict(Config()), **state["config"]}  # settings missing in older checkpoints: defaults
    current = dataclasses.asdict(cfg)
    differences = [
        f"{key}: {saved.get(key)!r} there, {current[key]!r} now"
        for key in current
        if key not in free and saved.get(key) != current[key]
    ]
    differences += [
        f"{key} has changed" for key in facts if key not in INFORMATIVE and state.get(key, "") != facts[key]
    ]
    if None not in commits and commits[0] != commits[1] and (cfg.lora_r or cfg.beta):
        differences.append(
            f"model_revision: the base model's commit was {commits[0]}, which is {commits[1]} now: name the first one"
        )
    if differences:
        raise UserError(
            f"resume: {folder} was trained with other settings ({'; '.join(differences[:3])}). Use the same ones, "
            "another --output_dir, or --resume never, which sets the old checkpoints aside."
        )


class SavedMoments:
    """The optimizer state of a checkpoint, written by any backend and world size. Raises UserError."""

    def __init__(self, folder: Path):
        self.pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}  # (parameter, moment) -> start, file, key
        for path in sorted((folder / "trainer").glob(f"{OPTIMIZER}*.safetensors")):
            try:
                self._index(path)
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(f"checkpoint: {path} holds no optimizer state ({error}). Use --resume never.") from None
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _index(self, path: Path) -> None:
        header = check_safetensors(path)
        file = safe_open(path, framework="pt")
        for key, (dtype, shape) in header.items():
            name, moment, start = ["", "", "", *key.rsplit("|", 2)][-3:]
            if not name or not re.fullmatch(r"\d{1,15}", start, re.A) or dtype not in TRAINABLE or len(shape) != 1:
                raise ValueError(f"{key[:80]!r} is no piece of a moment")
            self.pieces.setdefault((name, moment), []).append((int(start), file, key))

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:
        """[length] fp32: elements start to start+length of a flattened moment.

        Raises UserError when an element is missing, stored twice, or not finite.
        """
        values = torch.zeros(length)
        reached = start
        for first, file, key in self.pieces.get((name, moment), []):
            piece = file.get_slice(key)
            low, high = max(start, first), min(start + length, first + piece.get_shape()[0])
            if low < high:
                if low != reached:  # a gap, or a piece that is stored twice
                    break
                values[low - start : high - start] = piece[low - first : high - first].float()
                reached = high
        if reached != start + length:
            raise UserError(
                f"checkpoint: optimizer state of {name} holds {reached - start} of {length} elements in a row: it "
                "belongs to another model. Use --resume never."
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"checkpoint: optimizer state of {name} holds NaN or Inf. Use --resume never.")
        return values


def restore(policy: Policy, folder: Path | None) -> int:
    """Load a checkpoint's moments and counters into a policy built on its weights. Returns the steps done.

    Raises UserError when they do not match the model.
    """
    if folder is not None:
        policy.counters = read_state(folder)["counters"]
        policy.backend.load_moments(SavedMoments(folder).read, policy.counters.updates)
        for name, extra in policy.extras.items():
            path = folder / "trainer" / f"{name}.safetensors"
            try:
                check_safetensors(path)
                extra.load(load_file(path))
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(f"checkpoint: {path} cannot be used ({error}). Use --resume never.") from None
    return policy.counters.step
