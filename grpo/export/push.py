"""Sending an export to a hub. The token comes from HF_TOKEN or from `hf auth login`, and is never shown.

HF_ENDPOINT selects another hub. Pushing never changes the export, also when it fails.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from grpo.checkpoints.manifest import MANIFEST, file_sha256
from grpo.errors import UserError, first_line
from grpo.export.card import HUB_NAME, LIBRARIES, for_one_method
from grpo.models.folder_checks import location_problem
from grpo.models.lora_checks import ADAPTER_CONFIG
from grpo.strict_json import read_object

CARD = "README.md"


def check_name(name: str) -> None:
    """Refuse a text that cannot be a repository's name. Raises UserError."""
    bad = HUB_NAME.fullmatch(name) is None or "--" in name or ".." in name or name.endswith((".git", ".", "-"))
    if bad:
        raise UserError(f"push: must be user/name of letters, digits, -, _ and ., got {name[:80]!r}.")


def find_token() -> str:
    """The token of HF_TOKEN or of a login. Raises UserError without one."""
    token = get_token()
    if not token:
        raise UserError("push: no token. Set HF_TOKEN, or run `hf auth login`.")
    return token


def contents(out: Path) -> dict[str, Path | bytes]:
    """Name -> file or content of what is sent: the files of an export by its manifest, with manifests and card.

    out may be a folder of an export of several forms: its files may be in the manifest above, and its card is the one
    above, for this form. Raises UserError when a file has changed; the card may have been edited.
    """
    out = out.resolve()
    above = _entries(out.parent) if (out.parent / MANIFEST).is_file() else {}
    ours = {
        name.removeprefix(f"{out.name}/"): entry for name, entry in above.items() if name.startswith(f"{out.name}/")
    }
    files = _entries(out) if (out / MANIFEST).exists() or not ours else ours
    try:
        for name, entry in files.items():
            problem = location_problem(out, name)
            path = out / name
            if problem is None and (path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]):
                problem = f"{name} is not as it was written"
            if problem is not None:
                raise ValueError(problem)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_export(out, error) from None
    found = [name for name in (MANIFEST, CARD) if (out / name).is_file()]
    inner = [path.relative_to(out).as_posix() for path in out.glob(f"*/{MANIFEST}") if not path.is_symlink()]
    sent: dict[str, Path | bytes] = {name: out / name for name in sorted({*files, *found, *inner})}
    if CARD not in sent and ours and out.name in LIBRARIES and (out.parent / CARD).is_file():
        text = (out.parent / CARD).read_text(encoding="utf-8", errors="replace")
        sent[CARD] = for_one_method(text, out.name).encode()
    return sent


def _entries(folder: Path) -> dict[str, Any]:
    """The files in a folder's manifest. Raises UserError."""
    try:
        return dict(read_object(folder / MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_export(folder, error) from None


def _no_export(folder: Path, error: Exception) -> UserError:
    return UserError(f"push: {folder} is no whole export: {str(error)[:200]}. Export again.")


def push(out: Path, repo: str, private: bool, token: str | None, dry_run: bool) -> str:
    """Send the export in one commit, or with `dry_run` only list what would be sent. Returns the text to print.

    Raises UserError for an error of the hub or the network.
    """
    files = contents(out)
    if dry_run:
        sizes = "\n".join(f"{_size(content):>14,} {name}" for name, content in files.items())
        found = files.get(CARD, b"")
        card = found.decode() if isinstance(found, bytes) else found.read_text(encoding="utf-8")
        kind = "private" if private else "public"
        return f"would send {len(files)} files to {repo}, {kind} if new:\n{sizes}\n\n{card}"
    for name in files:
        if name.endswith(ADAPTER_CONFIG):
            base = str(read_object(out / name).get("base_model_name_or_path"))
            if base.startswith(("/", ".", "~")):
                raise UserError(
                    f"push: {name} names a folder of this machine as its base, which other machines lack. Export "
                    "merged_16bit, or train on the base by its hub name."
                )
    disable_progress_bars()
    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        done = api.create_commit(repo, operations, commit_message="Export")
    except Exception as error:  # the client, its HTTP library and its upload library raise many types
        raise UserError(
            f"push: {repo} refused, or not reached: {_without(token, error)}. The export in {out} is whole; to try "
            f"again: python -m grpo.export --out {out} --push {repo}"
        ) from None
    return f"sent {len(files)} files to {done.repo_url or repo}"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _without(token: str | None, error: Exception) -> str:
    """An error's first line, with the token removed."""
    line = first_line(error)
    return (line.replace(token, "***") if token else line)[:300].rstrip(".")
