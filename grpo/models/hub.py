"""Repositories of the Hugging Face hub, fetched into its cache as local folders.

A model from the hub becomes a local folder before anything opens it, and is checked like any other folder
(folder_checks.py). Its name may end in @revision: a branch, a tag or a commit. One request finds out whether a
repository exists; when the hub cannot be reached, the cached copy is used, without the minutes of retries of each
library.
"""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from grpo.errors import UserError, first_line, warn

TIMEOUT_S = 20.0  # of one request
SETTINGS = (".json", ".jinja", ".model", ".txt")  # files of a model or tokenizer other than weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TEMPLATES = "additional_chat_templates/"


@functools.cache
def fetch_model(name: str, weights: bool = True) -> Path:
    """The cached folder of a model on the hub. Raises UserError.

    weights: False leaves them out; a tokenizer needs none. Pickles and files for other programs are never fetched.
    """
    repository, _, revision = name.partition("@")
    files = _list_files("model", repository, revision or None)
    fetch = functools.partial(snapshot_download, repository, revision=revision or None)
    try:
        if files is None:
            return Path(fetch(local_files_only=True, allow_patterns=["config.json"]))
        adapter = "adapter_config.json" in files and "config.json" not in files  # small, and checked with its weights
        packed = next((file for file in files if file.endswith(".gguf")), None)
        if packed is not None and not any(file.endswith(".safetensors") for file in files):
            raise UserError(
                f"model: {name!r} on the hub holds GGUF files. Download one, with `hf download {name} {packed}`, and "
                "give its path."
            )
        needed = [file for file in files if _is_setting(file)] + (_weights(files, name) if weights or adapter else [])
        if not needed:
            raise UserError(f"model: {name!r} on the hub holds no model. Give another name, or a local folder.")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would log every retry
        return Path(fetch(allow_patterns=needed))
    except UserError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _unreachable("model", name) from None
    except Exception as error:  # the client raises exceptions of its HTTP library and of the disk
        reason = first_line(error)[:200]
        raise UserError(f"model: {name!r} could not be fetched from the hub: {reason}. Try again.") from None


def commit_of(folder: Path) -> str | None:
    """The commit of a fetched model's folder; None for other folders.

    >>> commit_of(Path("hub/models--user--tiny/snapshots/" + "0123456789" * 4))
    '0123456789012345678901234567890123456789'
    """
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def check_dataset(name: str) -> None:
    """Make sure that a dataset is on the hub, before `datasets` opens it. Raises UserError.

    When the hub cannot be reached, `datasets` uses its cache.
    """
    _list_files("dataset", name)


def no_cached_dataset(name: str) -> UserError | None:
    """The error for a dataset that is not in the cache while the hub cannot be reached; None when it can."""
    return _unreachable("dataset", name) if huggingface_hub.constants.is_offline_mode() else None


def _list_files(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> list[str] | None:
    """Names of a repository's files; None when the hub cannot be reached. Raises UserError when it refuses."""
    what = "data" if kind == "dataset" else "model"
    if huggingface_hub.constants.is_offline_mode():
        return None
    try:
        repository: Any = huggingface_hub.HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
        return [file.rfilename for file in repository.siblings or []]
    except HFValidationError:
        raise UserError(f"{what}: {name!r} is no file, no folder and no name on the hub. Mend it.") from None
    except GatedRepoError:
        raise UserError(
            f"{what}: {name!r} is gated: its owner decides who gets it. Ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what}: there is no {kind} {name!r} on the hub ({huggingface_hub.constants.ENDPOINT}), or it is private. "
            "Mend the name, or log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{what}_revision: there is no {revision!r} of {name!r} on the hub ({huggingface_hub.constants.ENDPOINT}). "
            "Name a branch, a tag or a commit of it."
        ) from None
    except Exception as error:  # no connection, a timeout, a malformed response: exceptions of several libraries
        _go_offline(error)
        return None


def _go_offline(error: Exception) -> None:
    """Use only the cache from now on, as HF_HUB_OFFLINE=1 would; the libraries read that variable at import."""
    reason = first_line(error)[:200]
    warn(f"note: the hub ({huggingface_hub.constants.ENDPOINT}) cannot be reached ({reason}); its cache is used")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _unreachable(kind: str, name: str) -> UserError:
    what = "data" if kind == "dataset" else "model"
    return UserError(
        f"{what}: {name!r} is no local file or folder, not in the cache of the hub, and the hub "
        f"({huggingface_hub.constants.ENDPOINT}) cannot be reached or HF_HUB_OFFLINE is set. Mend the connection, or "
        "give a local path."
    )


def _is_setting(file: str) -> bool:
    return file.endswith(SETTINGS) and ("/" not in file or file.startswith(TEMPLATES))


def _weights(files: Sequence[str], name: str) -> list[str]:
    """The files with a model's or an adapter's weights, each tensor once. Raises UserError when all are pickles.

    >>> _weights(["model-1-of-2.safetensors", "model-2-of-2.safetensors", "pytorch_model.bin"], "m")
    ['model-1-of-2.safetensors', 'model-2-of-2.safetensors']
    """
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if single in files:
            return [single]
    found = [file for file in files if file.endswith(".safetensors") and file.startswith("model") and "/" not in file]
    if not found:
        pickled = next((f"a pickle ({file}), which could run code" for file in files if file.endswith(PICKLES)), None)
        raise UserError(
            f"model: {name!r} on the hub is not opened: its weights are {pickled or 'not in a safetensors file'}. "
            "Use one with safetensors weights."
        )
    return found
