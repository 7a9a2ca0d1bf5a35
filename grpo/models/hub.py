"""Repositories of the Hugging Face hub: fetched into its cache, where they are folders like any other.

A model from the hub becomes a local folder before anything opens it, and that folder is looked at like every other
(folder_checks.py). One question to the hub says whether a repository is there; when the hub cannot be reached, the
cached copy serves, without the minutes of retries that each library would make on its own.
"""

import functools
import logging
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
)

from grpo.errors import UserError, warn

TIMEOUT_S = 20.0  # for the answer to one question
SETTINGS = (".json", ".jinja", ".model", ".txt")  # of a model or tokenizer, beside its weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TEMPLATES = "additional_chat_templates/"


@functools.cache
def fetch_model(name: str, weights: bool = True) -> Path:
    """The cached folder of a model on the hub. Raises UserError.

    weights: False leaves them out, as a tokenizer needs none. Files for other programs are never fetched, pickles
    neither.
    """
    files = _ask("model", name)
    try:
        if files is None:
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
        adapter = "adapter_config.json" in files and "config.json" not in files  # small, and looked at as a whole
        wanted = [file for file in files if _is_setting(file)] + (_weights(files, name) if weights or adapter else [])
        if not wanted:
            raise UserError(f"model: {name!r} on the hub holds no model. Give another name, or a local folder.")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of its retries the error says enough
        return Path(snapshot_download(name, allow_patterns=wanted))
    except UserError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _unreachable("model", name) from None
    except Exception as error:  # of HTTP, of the disk: the client raises its libraries' kinds
        raise UserError(f"model: {name!r} could not be fetched from the hub: {_brief(error)}. Try again.") from None


def check_dataset(name: str) -> None:
    """Make sure that a dataset is on the hub, before `datasets` looks for it. Raises UserError.

    When the hub cannot be reached, `datasets` is left to its cache.
    """
    _ask("dataset", name)


def no_cached_dataset(name: str) -> UserError | None:
    """Why a dataset that could not be opened is not there: the hub cannot be reached. None: for another reason."""
    return _unreachable("dataset", name) if huggingface_hub.constants.is_offline_mode() else None


def _ask(kind: Literal["model", "dataset"], name: str) -> list[str] | None:
    """Names of a repository's files; None where the hub cannot be reached. Raises UserError when it says no."""
    what = "data" if kind == "dataset" else "model"
    if huggingface_hub.constants.is_offline_mode():
        return None
    try:
        found: Any = huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
        return [file.rfilename for file in found.siblings or []]
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
    except Exception as error:  # no connection, no answer in time, an answer that is none: many libraries' kinds
        _go_offline(error)
        return None


def _go_offline(error: Exception) -> None:
    """From now on the cache alone: as HF_HUB_OFFLINE=1 does, which the libraries read before we can know."""
    warn(f"note: the hub ({huggingface_hub.constants.ENDPOINT}) cannot be reached ({_brief(error)}); its cache is used")
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
    """The files with a model's or an adapter's weights, each tensor once. Raises UserError when only pickles are there.

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


def _brief(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
