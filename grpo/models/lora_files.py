"""An adapter's two files, adapter_config.json and adapter_model.safetensors, in the format of plain peft.

Files are checked before they are read (lora_checks.py) and read back after they are written. An adapter is refused
when a value is not finite, or when B A is zero in every module: B starts at zero, so nothing was trained. Some modules
may be zero; they are counted.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.config.names import find_path
from grpo.errors import UserError
from grpo.models.lora_checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, is_adapter
from grpo.strict_json import read_object

NOTHING_TRAINED = "nothing was trained"  # the end of `problem_of` for an adapter as it was at the start

PREFIX = "base_model.model."  # of every name in adapter_model.safetensors
ACTIVE, REFERENCE = "default", "reference"  # names of adapters inside a model


def base_of(folder: Path) -> str:
    """The model that an adapter belongs to: an existing folder or a hub name, with @revision. Raises UserError."""
    settings = settings_of(folder)
    name = settings["base_model_name_or_path"]
    path = find_path(name)
    if path is None and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"adapter: {folder} belongs to the model {name!r}, which does not exist. Put it there, or mend "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    if path is not None and is_adapter(path):
        raise UserError(f"adapter: {folder} belongs to {name!r}, an adapter itself. Merge that one first.")
    return name if path is not None or not settings.get("revision") else f"{name}@{settings['revision']}"


def dtype_of_4bit(folder: Path) -> torch.dtype | None:
    """The compute dtype of a checkpoint of ours that was trained on 4-bit weights; None for all others."""
    try:
        settings = read_object(folder / "trainer" / "state.json")["config"]
        if settings.get("load_in_4bit") is True:
            return torch.bfloat16 if settings.get("dtype") == "bf16" else torch.float32
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # an adapter from elsewhere
        pass
    return None


def settings_of(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, after all checks. Raises UserError."""
    try:
        return check_adapter(folder)
    except OSError as error:
        raise UserError(f"adapter: {folder} cannot be read: {error.strerror or error}. Give another folder.") from None
    except ValueError as error:
        raise UserError(f"adapter: {folder} is not opened: {error}. Use another adapter, or fetch it again.") from None


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read adapter_model.safetensors, after all checks. Raises UserError."""
    settings_of(folder)
    return load_file(folder / ADAPTER_WEIGHTS)


def inner_name(name: str, adapter: str = ACTIVE) -> str:
    """Name in the file -> name of the parameter.

    >>> inner_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    'model.layers.0.mlp.up_proj.lora_A.default.weight'
    """
    return name.removeprefix(PREFIX).removesuffix("weight") + f"{adapter}.weight"


def outer_name(name: str) -> str:
    """Name of the parameter -> name in the file.

    >>> outer_name("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return PREFIX + name.replace(f".{ACTIVE}.weight", ".weight").replace(f".{REFERENCE}.weight", ".weight")


def write_adapter(config: dict[str, Any], weights: Iterable[tuple[str, Tensor]], folder: Path) -> str | None:
    """Write the two files and read them back. Returns why the adapter is useless (`problem_of`), or None.

    config: peft's LoraConfig as a dictionary. weights: (name of the parameter, tensor).
    """
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps({**config, "inference_mode": True}, indent=2, default=str, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    stored = {outer_name(name): tensor.contiguous() for name, tensor in weights}
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return problem_of(tensors_of(folder))


def saved_line(folder: Path) -> str:
    """The line printed after an adapter was written and read back."""
    num_zero, num_modules = zero_modules(tensors_of(folder))
    zeros = f" {num_zero} of {num_modules} modules are still zero." if num_zero else ""
    return f"LoRA weights saved and verified.{zeros}"


def problem_of(stored: dict[str, Tensor]) -> str | None:
    """Why an adapter is useless: a value is not finite, or B A is zero in every module. None otherwise.

    >>> problem_of({"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.zeros(2, 1)})
    'all its weights are zero (B A of each of its 1 modules): nothing was trained'
    """
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or Inf"
    num_zero, num_modules = zero_modules(stored)
    if num_zero == num_modules:
        return f"all its weights are zero (B A of each of its {num_modules} modules): {NOTHING_TRAINED}"
    return None


def zero_modules(stored: dict[str, Tensor]) -> tuple[int, int]:
    """(modules whose A or B is all zero, so that the adapter does not change them; all modules)"""
    zero: dict[str, bool] = {}
    for name, tensor in stored.items():
        module = name.rpartition(".lora_")[0]
        zero[module] = zero.get(module, False) or not bool(tensor.any())
    return sum(zero.values()), len(zero)


def refuse_empty(folder: Path, stored: dict[str, Tensor]) -> None:
    """Raises UserError for an adapter that changes nothing, or holds NaN or Inf."""
    problem = problem_of(stored)
    if problem is not None:
        raise UserError(f"adapter: {folder} is refused: {problem}. Use another checkpoint.")
