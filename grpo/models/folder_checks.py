"""Checks of model folders and checkpoints of unknown origin, before any library opens them.

JSON is read strictly (size, depth, duplicate keys, NaN), safetensors headers are checked by that library,
and files that could run code, point out of the folder or block on reading are named and refused. Nothing here imports
torch or transformers. Functions named `check_...` raise ValueError with the reason.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo.strict_json import check_regular, read_object

MAX_VOCABULARY_BYTES = 2**28  # tokenizer.json and its like: tens of megabytes in practice
MAX_TEMPLATE_BYTES = 2**20
TRAINABLE = {"F64", "F32", "F16", "BF16"}
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)
OPENED_BY_LOADERS = {
    ".json",
    ".safetensors",
    ".jinja",
    ".model",
    ".txt",
    ".py",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".gguf",
}
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NEEDED = (("config.json", "adapter_config.json"), ("trainer/state.json",), ("trainer/recipe.json",))  # one of each


def check_safetensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Read the header, and only the header, of a safetensors file. Returns tensor name -> (dtype, shape).

    The library checks that the tensors fill the file without gaps, each with the length of its dtype and shape.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"it is no valid safetensors file: {error}") from None


def _values_of(settings: Any, key_pattern: str) -> Iterator[Any]:
    """Values whose key matches, at any depth."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if re.fullmatch(key_pattern, key):
                yield value
            yield from _values_of(value, key_pattern)
    elif isinstance(settings, list):
        for value in settings:
            yield from _values_of(value, key_pattern)


def _check_settings(settings: dict[str, Any]) -> None:
    if next(_values_of(settings, "auto_map"), None) is not None:
        raise ValueError("it wants to run code of its own (auto_map), which is never done")
    for value in _values_of(settings, r"\w*(attn|experts)_implementation\w*"):
        if "/" in str(value):
            raise ValueError(f"it names code to fetch, {str(value)[:60]!r}, which is never done")
    templates = settings.get("chat_template")
    for template in templates if isinstance(templates, list) else []:
        # transformers uses the name as a file name when it saves the tokenizer
        if not isinstance(template, dict) or not re.fullmatch(r"[\w-]{1,64}", str(template.get("name")), re.A):
            raise ValueError("a chat template's name is not a plain word")
    if templates is not None and len(json.dumps(templates)) > MAX_TEMPLATE_BYTES:
        raise ValueError(f"its chat template is longer than {MAX_TEMPLATE_BYTES} characters")


def check_index(path: Path) -> list[str]:
    """The safetensors files, all in the same folder, that a weights index names."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name, re.A):
            raise ValueError(f"it points to {str(name)[:80]!r}: only safetensors files in the same folder are read")
    return sorted(set(weight_map.values()))


def check_entry(path: Path) -> None:
    """Check one file of a model folder; its name decides how."""
    if path.is_dir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            raise ValueError("it is a folder, not a file")
        return
    check_regular(path)
    if path.name == "adapter_config.json":
        raise ValueError("an adapter's settings are beside a model's config.json: remove one of the two")
    if path.name in SETTINGS:
        _check_settings(read_object(path, infinity=True))
    elif path.suffix == ".jinja":
        check_regular(path, MAX_TEMPLATE_BYTES)
    elif path.name == "model.safetensors":
        check_safetensors(path)
    elif path.name.endswith(".safetensors.index.json"):
        for name in check_index(path):
            if (path.parent / name).exists():  # a tokenizer's folder is checked before weights are fetched
                check_safetensors(path.parent / name)
    elif path.suffix in (".json", ".model", ".txt"):
        check_regular(path, MAX_VOCABULARY_BYTES)


def model_problem(folder: Path) -> str | None:
    """Why a model folder must not be opened, naming the file; None when it may be."""
    path = folder / "config.json"
    try:
        check_entry(path)
        for path in [*sorted(folder.iterdir()), *sorted(folder.glob("additional_chat_templates/*"))]:
            check_entry(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"{path.name}: {error}"
    return None


def weights_problem(folder: Path) -> str | None:
    """Why the weights of a folder cannot be the model's; None when they can. Call `model_problem` first."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = [single.name] if single.exists() else check_index(index) if index.exists() else []
    if not names:
        pickled = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickled:
            return f"its weights are a pickle ({pickled[0]}), which could run code; only safetensors are read"
        return "it holds no model.safetensors"
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        return f"it holds no {missing[0]}, which its index names"
    tensors = {name: facts for file in names for name, facts in check_safetensors(folder / file).items()}
    largest = max((max(shape, default=0) for _, shape in tensors.values()), default=0)
    config = read_object(folder / "config.json", infinity=True)
    for key, limit in (("vocab_size", largest), ("hidden_size", largest), ("num_hidden_layers", len(tensors))):
        for value in _values_of(config, key):
            if type(value) is int and not 0 < value <= limit:
                return f"config.json has {key} {value}, which does not fit its weights"
    return None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256) of a checkpoint's manifest. Raises OSError or ValueError."""
    if path.is_symlink():
        raise ValueError("it is a link")
    files = read_object(path).get("files")
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not (name.isascii() and name.isprintable()) or "\\" in name or "/".join(parts) != name or ".." in parts:
            raise ValueError(f"{ascii(name)[:80]} points elsewhere")
        if name.startswith("/") or not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise ValueError(f"its entry of {name[:80]} is wrong")
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256")), re.A):
            raise ValueError(f"its entry of {name[:80]} is wrong")
    missing = [names for names in NEEDED if not any(name in files for name in names)]
    if missing:
        raise ValueError(f"it does not list {missing[0][0]}")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def location_problem(folder: Path, name: str) -> str | None:
    """Why a listed file is not a regular file inside the folder; None when it is. Opens nothing."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return f"{name} points elsewhere"
    try:
        return None if stat.S_ISREG(os.lstat(path).st_mode) else f"{name} is not a regular file"
    except OSError:
        return f"{name} is missing"
