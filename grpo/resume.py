"""Continuing from a checkpoint: the same run, or a clear refusal; weights, moments and counters as they were.

The optimizer state is read piece by piece, by parameter name and offset, so it does not matter which backend
and how many ranks wrote it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import Policy
from grpo.types import Counters

FREE_TO_CHANGE = {  # settings that do not change what is trained; all others must match on resume
    "output_dir", "save_steps", "save_total_limit", "resume", "runs_dir", "run_name", "report_to",
    "log_samples_steps", "eval_data", "eval_split", "eval_rows", "eval_steps", "num_threads", "device",
    "micro_batch_tokens", "rollout_chunk_rows", "logits_chunk_mb", "gradient_checkpointing", "max_bad_steps",
    "max_reward_failures", "inference_questions", "backend", "zero_stage", "offload", "deepspeed_config",
}  # fmt: skip


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


class SavedMoments:
    """The optimizer state of a checkpoint, whichever backend and world size wrote it."""

    def __init__(self, folder: Path):
        self.files = [
            safe_open(path, framework="pt") for path in sorted((folder / "trainer").glob("optimizer-*.safetensors"))
        ]
        self.pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in self.files:
            for key in file.keys():  # noqa: SIM118  safe_open is no dict
                name, moment, start = key.rsplit("|", 2)
                self.pieces.setdefault((name, moment), []).append((int(start), file, key))

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:
        """Elements start … start+length of a flattened moment. Raises UserError when they are not all there."""
        values = torch.zeros(length)
        found = 0
        for first, file, key in self.pieces.get((name, moment), []):
            piece = file.get_slice(key)
            low, high = max(start, first), min(start + length, first + piece.get_shape()[0])
            if low < high:
                values[low - start : high - start] = piece[low - first : high - first].float()
                found += high - low
        if found != length:
            raise UserError(
                f"checkpoint: optimizer state of {name} holds {found} of {length} elements: it belongs to another "
                "model. Use --resume never."
            )
        return values


def restore(policy: Policy, folder: Path | None) -> int:
    """Put a checkpoint's moments and counters into a policy built on its weights. Returns the steps done.

    Raises UserError when they do not fit.
    """
    if folder is not None:
        policy.counters = read_state(folder)["counters"]
        policy.backend.load_moments(SavedMoments(folder).read, policy.counters.updates)
    return policy.counters.step
