"""An adapter's two files, adapter_config.json and adapter_model.safetensors, as plain peft writes and opens them.

What is read was looked at first (grpo/models/lora_checks.py); what was written is read back. An adapter is of no use
when a number is not finite, or when B A is zero in every module: B starts at zero, so nothing was trained then. A
module that is still zero among others is no fault: it is counted.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.config.settings import find_path
from grpo.errors import UserError
from grpo.models.lora_checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, is_adapter
from grpo.strict_json import read_object

PREFIX = "base_model.model."  # of every name in adapter_model.safetensors
ACTIVE, REFERENCE = "default", "reference"  # names of adapters inside a model


def base_of(folder: Path) -> str:
    """The model that an adapter belongs to: a folder that is there, or a hub name. Raises UserError."""
    named = settings_of(folder)["base_model_name_or_path"]
    path = find_path(named)
    if path is None and (named.startswith((".", "/", "~")) or named.count("/") != 1):
        raise UserError(
            f"adapter: {folder} belongs to the model {named!r}, which is not there. Put it there, or mend "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    if path is not None and is_adapter(path):
        raise UserError(f"adapter: {folder} belongs to {named!r}, an adapter itself. Merge that one first.")
    return named


def held_in_4bit(folder: Path) -> torch.dtype | None:
    """The arithmetic of one of our own checkpoints that was trained on a model held in 4 bits; None for all others."""
    try:
        settings = read_object(folder / "trainer" / "state.json")["config"]
        if settings.get("load_in_4bit") is True:
            return torch.bfloat16 if settings.get("dtype") == "bf16" else torch.float32
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # an adapter from elsewhere
        pass
    return None


def settings_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json, looked at. Raises UserError."""
    try:
        return check_adapter(folder)
    except OSError as error:
        raise UserError(f"adapter: {folder} cannot be read: {error.strerror or error}. Give another folder.") from None
    except ValueError as error:
        raise UserError(f"adapter: {folder} is not opened: {error}. Use another adapter, or fetch it again.") from None


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors, looked at first. Raises UserError."""
    settings_of(folder)
    return load_file(folder / ADAPTER_WEIGHTS)


def inner_name(name: str, adapter: str = ACTIVE) -> str:
    """A stored name -> the parameter's.

    >>> inner_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    'model.layers.0.mlp.up_proj.lora_A.default.weight'
    """
    return name.removeprefix(PREFIX).removesuffix("weight") + f"{adapter}.weight"


def outer_name(name: str) -> str:
    """A parameter's name -> the stored one.

    >>> outer_name("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return PREFIX + name.replace(f".{ACTIVE}.weight", ".weight").replace(f".{REFERENCE}.weight", ".weight")


def write_adapter(config: dict[str, Any], weights: Iterable[tuple[str, Tensor]], folder: Path) -> str | None:
    """Write the two files that plain peft opens, and read them back. Returns why the adapter is of no use, or None.

    config: what peft's LoraConfig gives as a dictionary. weights: by their parameters' names.
    """
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps({**config, "inference_mode": True}, indent=2, default=str, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    stored = {outer_name(name): tensor.contiguous() for name, tensor in weights}
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return problem_of(tensors_of(folder))


def verdict(folder: Path) -> str:
    """What to say of an adapter that was written, and read back."""
    idle, modules = idle_modules(tensors_of(folder))
    return "LoRA weights saved and verified." + (f" {idle} of {modules} modules are still zero." if idle else "")


def problem_of(stored: dict[str, Tensor]) -> str | None:
    """Why an adapter is of no use; None when it is: finite, and B A is not zero in every module.

    >>> problem_of({"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.zeros(2, 1)})
    'all its weights are zero (B A of each of its 1 modules): nothing was trained'
    """
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or Inf"
    idle, modules = idle_modules(stored)
    if idle == modules:
        return f"all its weights are zero (B A of each of its {modules} modules): nothing was trained"
    return None


def idle_modules(stored: dict[str, Tensor]) -> tuple[int, int]:
    """Modules that the adapter leaves as they are, because A or B is all zero; and modules in all."""
    zero: dict[str, bool] = {}
    for name, tensor in stored.items():
        module = name.rpartition(".lora_")[0]
        zero[module] = zero.get(module, False) or not bool(tensor.any())
    return sum(zero.values()), len(zero)


def refuse_empty(folder: Path, stored: dict[str, Tensor]) -> None:
    """Raises UserError for an adapter that changes nothing, or holds numbers that are none."""
    problem = problem_of(stored)
    if problem is not None:
        raise UserError(f"adapter: {folder} is refused: {problem}. Use another checkpoint.")
