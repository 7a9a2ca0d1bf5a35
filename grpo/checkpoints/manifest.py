"""MANIFEST.json: size and sha256 of every file of a checkpoint. Written last; every reader verifies it first."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.models.folder_checks import (
    OPENED_BY_LOADERS,
    check_safetensors,
    location_problem,
    model_problem,
    read_manifest,
    weights_problem,
)
from grpo.models.lora_checks import adapter_problem, is_adapter
from grpo.strict_json import read_json, read_object

MANIFEST = "MANIFEST.json"
OPTIMIZER = "optimizer-"  # how the names of files of optimizer state begin
CHECKPOINT_NAME = re.compile(r"checkpoint_([0-9]{1,12})")


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder except the manifest, sorted."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tree_sha256(path: Path) -> str:
    """Fingerprint of a file, or of every file in a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else files_in(path):
        digest.update(f"{file.relative_to(path.parent)}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_text(step: Any, files: Any) -> str:
    """The only valid text of a manifest, so that a change of any byte is found."""
    return json.dumps({"format": 1, "step": step, "files": files}, indent=2) + "\n"


def write_manifest(folder: Path, step: int) -> None:
    """Sync every file, write sizes and hashes, sync the manifest and the folders. Raises OSError."""
    files = {}
    for path in files_in(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(manifest_text(step, files), encoding="utf-8")
    for path in (manifest, *(path for path in sorted(folder.rglob("*")) if path.is_dir()), folder):
        sync(path)


def verify(folder: Path) -> str | None:
    """Why a folder is not a valid checkpoint, naming the file; None when it is valid.

    Only the manifest is parsed before the size and the hash of every file have been compared.
    """
    try:
        listed = read_manifest(folder / MANIFEST)
        manifest = read_json(folder / MANIFEST)
        if (folder / MANIFEST).read_bytes() != manifest_text(manifest.get("step"), manifest.get("files")).encode():
            return f"{MANIFEST} is damaged: not as it was written"
    except OSError:
        return f"{MANIFEST} is missing"
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    if match and manifest["step"] != int(match[1]):
        return f"{MANIFEST} belongs to step {manifest['step']}"
    for name, (size, sha256) in listed.items():
        path = folder / name
        problem = location_problem(folder, name)
        if problem is not None:
            return problem
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
        if file_sha256(path) != sha256:
            return f"{name} does not match its sha256"
    return content_problem(folder, set(listed))


def content_problem(folder: Path, listed: set[str]) -> str | None:
    """Why a checkpoint must not be opened although its files match their hashes; None when it may be opened."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in OPENED_BY_LOADERS and name not in listed and name != MANIFEST:
            return f"{name} is not in the manifest"
    problem = adapter_problem(folder) if is_adapter(folder) else model_problem(folder) or weights_problem(folder)
    if problem is not None:
        return problem
    for path in sorted((folder / "trainer").iterdir()):
        try:
            if path.suffix == ".json":
                read_object(path)
            elif path.suffix == ".safetensors":
                check_safetensors(path)
        except (OSError, ValueError) as error:
            return f"trainer/{path.name}: {error}"
    return None
