"""Sending an export to a hub (grpo/models/upload.py). Pushing never changes the export, also when it fails."""

from pathlib import Path, PurePath
from typing import Any

from grpo.checkpoints.card import LIBRARIES, for_one_method
from grpo.checkpoints.manifest import MANIFEST, OPTIMIZER, file_sha256
from grpo.config.checks import REPOSITORY_IN_WORDS, is_repository
from grpo.config.names import find_path
from grpo.errors import UserError
from grpo.models.folder_checks import location_problem
from grpo.models.lora_checks import ADAPTER_CONFIG
from grpo.models.upload import send, without_token
from grpo.strict_json import read_object

CARD = "README.md"


def check_name(name: str) -> None:
    """Refuse a text that cannot be a repository's name. Raises UserError."""
    if not is_repository(name):
        raise UserError(f"push: must be {REPOSITORY_IN_WORDS}, got {name[:80]!r}.")


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
    _check_is_export(out, [*files])
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


def _check_is_export(out: Path, names: list[str]) -> None:
    """Refuse a checkpoint of a run, whose files hold optimizer state and paths of this machine. Raises UserError."""
    if any(PurePath(name).name.startswith(OPTIMIZER) for name in names):
        raise UserError(
            f"push: {out.name} is a checkpoint of a run, with optimizer state and paths of this machine, no export. "
            f"Export it: --checkpoint {out} --to merged_16bit --out exported --push USER/NAME."
        )
    for name in names:
        if PurePath(name).name != ADAPTER_CONFIG:
            continue
        try:
            base = str(read_object(out / name).get("base_model_name_or_path"))
        except (OSError, ValueError) as error:
            raise _no_export(out, error) from None
        if base.startswith(("/", ".", "~")) or find_path(base) is not None:
            raise UserError(
                f"push: {name} names {base[:80]!r} as its base, a folder of this machine, which other machines lack. "
                "Export merged_16bit, or train on the base by its hub name."
            )


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
    try:
        where = send(files, repo, private, token, "Export")
    except Exception as error:  # the client, its HTTP library and its upload library raise many types
        raise UserError(
            f"push: {repo} refused, or not reached: {without_token(token, error)}. The export in {out} is whole; to "
            f"try again: python -m grpo.export --out {out} --push {repo}"
        ) from None
    return f"sent {len(files)} files to {where}"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
