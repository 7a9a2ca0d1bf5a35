"""Checks of adapters of unknown origin, before any library opens them (folder_checks.py checks models).

Only plain LoRA is accepted: peft has dozens of settings, some of which change the model, read further files, or hold
patterns that take a matcher exponential time. Nothing here imports torch.
"""

import math
import re
from pathlib import Path
from typing import Any

from grpo.config.checks import REVISION
from grpo.models.folder_checks import TRAINABLE, check_entry, check_safetensors
from grpo.strict_json import read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_RANK, MAX_MODULES = 2**14, 2**14
STORED_NAME = re.compile(r"base_model\.model\.[\w.]{1,300}\.lora_[AB]\.weight", re.A)
WITHOUT_EFFECT = {  # keys of adapter_config.json that change no numbers, or that follow from the model
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "task_type",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "init_lora_weights",
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def _is_names(value: Any) -> bool:
    names = [name for name in value if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,300}", name, re.A)]
    return 0 < len(value) == len(names) <= MAX_MODULES


def check_adapter(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and check that it is plain LoRA, and its weights. Raises OSError or ValueError."""
    path = folder / ADAPTER_CONFIG
    settings = read_object(path)
    rank, alpha, modules = (settings.get(key) for key in ("r", "lora_alpha", "target_modules"))
    dropout, layers = settings.get("lora_dropout", 0.0), settings.get("layers_to_transform")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    wrong = {
        "peft_type": settings.get("peft_type") != "LORA",
        "r": not (type(rank) is int and 1 <= rank <= MAX_RANK),
        "lora_alpha": not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf),
        "lora_dropout": type(dropout) not in (int, float) or not 0 <= dropout < 1,
        "target_modules": modules != "all-linear" and not (isinstance(modules, list) and _is_names(modules)),
        "layers_to_transform": layers is not None
        and not (isinstance(layers, list) and all(type(index) is int for index in layers)),
        "use_rslora": type(settings.get("use_rslora", False)) is not bool,
        "revision": revision is not None and not (isinstance(revision, str) and REVISION.fullmatch(revision)),
        "base_model_name_or_path": not isinstance(base, str) or not base or "\0" in base or len(base) > 4096,
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{ADAPTER_CONFIG}: {key} is {ascii(settings.get(key))[:80]}: only plain LoRA is read")
    if isinstance(settings.get("init_lora_weights"), str):
        raise ValueError(
            f"{ADAPTER_CONFIG}: init_lora_weights changed the model it was trained on: only plain LoRA is read"
        )
    for key in sorted(settings.keys() - wrong.keys() - WITHOUT_EFFECT):
        if settings[key] not in (None, False, "none") and settings[key] != {} and settings[key] != []:
            raise ValueError(f"{ADAPTER_CONFIG}: {key[:60]} is set: only plain LoRA is read")
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickled = "; adapter_model.bin is a pickle, which could run code" if (folder / PICKLE).exists() else ""
        raise ValueError(f"it holds no {ADAPTER_WEIGHTS}{pickled}")
    for name, (dtype, shape) in check_safetensors(folder / ADAPTER_WEIGHTS).items():
        if not STORED_NAME.fullmatch(name) or dtype not in TRAINABLE or len(shape) != 2:
            raise ValueError(f"{ADAPTER_WEIGHTS}: {ascii(name)[:120]} {dtype} {shape} is not a matrix of plain LoRA")
    return settings


def adapter_problem(folder: Path) -> str | None:
    """Why an adapter's folder must not be opened, naming the file; None when it may be."""
    path = folder / ADAPTER_CONFIG
    try:
        check_adapter(folder)
        for path in [*sorted(folder.iterdir()), *sorted(folder.glob("additional_chat_templates/*"))]:
            if path.name != ADAPTER_CONFIG:
                check_entry(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"{path.name}: {error}" if path.name not in str(error) else str(error)
    return None
