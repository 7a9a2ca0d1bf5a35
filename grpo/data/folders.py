"""Folders of plain data files, such as a cloned dataset: which files make up a split.

`datasets` decides which split a file belongs to, by its name (train.jsonl, data/test-00000-of-00002.parquet,
dev/a.csv) or by the `configs` in the header of README.md. Where several choices remain, they are refused.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import DEFAULT_PATTERNS_ALL, DataFilesDict, EmptyDatasetError, get_data_patterns

from grpo.errors import UserError
from grpo.strict_json import check_regular

MAX_CARD_BYTES = 2**22  # of README.md
SHOWN = 4  # files that an error names
Patterns = dict[str, list[str]]  # split -> patterns of its files


def files_of(folder: Path, split: str, config: str | None, kinds: dict[str, str]) -> tuple[list[Path], str]:
    """The files of a split, in order, and their kind. Raises UserError.

    config: a configuration that README.md names, or a subfolder. kinds: file extension -> kind of file.
    """
    named = _configs(folder)
    if config is not None and not named:
        if not (re.fullmatch(r"[\w.-]+", config) and (folder / config).is_dir()):
            raise UserError(
                f"data_config: {folder} has no configurations: no README.md names any, and no folder in it is called "
                f"{config!r}. Leave it out, or give the data's file itself."
            )
        folder = folder / config
    patterns = _patterns_of_config(folder, named, config) if named else _patterns_by_name(folder, kinds)
    found = DataFilesDict.from_patterns(_as_datasets(patterns), base_path=str(folder), allowed_extensions=list(kinds))
    splits = {str(name): sorted(Path(file) for file in files) for name, files in found.items() if files}
    one_split = not named and patterns == {str(name): list(those) for name, those in DEFAULT_PATTERNS_ALL.items()}
    if one_split:  # no file name names a split: one file is required, and it is the whole data
        [files] = splits.values()
    elif split in splits:
        files = splits[split]
    else:
        raise UserError(f"data: {folder} has no split {split!r}, only {sorted(splits)}. Use --data_split.")
    found_kinds = {kinds[file.suffix.lower()] for file in files}
    are_parts = len({_without_numbers(file) for file in files}) == 1 and not (one_split and len(files) > 1)
    if len(found_kinds) > 1 or not (named or are_parts):
        shown = ", ".join(os.path.relpath(file, folder) for file in files[:SHOWN])
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        what = "and no file name names a split" if one_split else f"all of which may be its split {split!r}"
        raise UserError(f"data: {folder} holds {shown}{more}, {what}. Give one of them: --data {files[0]}.")
    _check_complete(folder, files)
    return files, found_kinds.pop()


def _patterns_by_name(folder: Path, kinds: dict[str, str]) -> Patterns:
    try:
        found = get_data_patterns(str(folder))
    except EmptyDatasetError:
        found = {}
    patterns = {str(split): list(those) for split, those in found.items()}
    data = DataFilesDict.from_patterns(_as_datasets(patterns), base_path=str(folder), allowed_extensions=list(kinds))
    if not any(data.values()):
        raise UserError(
            f"data: {folder} holds neither a dataset of save_to_disk nor data files ({', '.join(kinds)}). "
            "Give a folder with data, or a file."
        )
    return patterns


def _as_datasets(patterns: Patterns) -> dict[str, Any]:
    return dict(patterns)


def _without_numbers(file: Path) -> Path:
    """The name that the parts of one split share."""
    return file.with_name(re.sub(r"\d+", "#", file.name))


def _check_complete(folder: Path, files: list[Path]) -> None:
    """Raises UserError when files named like data-00000-of-00002 are not complete."""
    parts = Counter(
        (file.parent, file.name[: match.start()], int(match[1]))
        for file in files
        if (match := re.search(r"-\d+-of-(\d+)", file.name))
    )
    for (_, name, total), found in parts.items():
        if found != total:
            raise UserError(
                f"data: {folder} holds {found} of the {total} parts {name}-*-of-{total:05d}. Fetch all of them."
            )


def _configs(folder: Path) -> dict[str, Any]:
    """Configuration -> its entry in README.md; empty without such entries. Raises UserError."""
    card = folder / "README.md"
    try:
        if not card.exists():
            return {}
        check_regular(card, MAX_CARD_BYTES)
        head = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", card.read_text(encoding="utf-8-sig"), re.S)
        if head and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head[1], Loader=yaml.SafeLoader)):
            raise ValueError("references (*name) are not read")  # a few of them can expand to gigabytes
        settings = yaml.safe_load(head[1]) if head else None
        entries = settings.get("configs") if isinstance(settings, dict) else None
        if entries is None:
            return {}
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("configs is not a list of configurations")
        with_files = [entry for entry in entries if "data_files" in entry]
        named = {str(entry.get("config_name", "default"))[:100]: entry for entry in with_files}
        if len(named) != len(with_files):
            raise ValueError("two configs have one name")
        return named
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"data: {card} is not understood: {' '.join(str(error).split())[:200]}. Mend its head, or give a file."
        ) from None


def _patterns_of_config(folder: Path, named: dict[str, Any], config: str | None) -> Patterns:
    """Patterns of the given configuration; without one, of the only one or the default. Raises UserError."""
    defaults = [name for name, entry in named.items() if len(named) == 1 or name == "default" or entry.get("default")]
    wanted = config if config is not None else defaults[0] if len(defaults) == 1 else None
    if wanted not in named:
        got = "" if config is None else f", not {config!r}"
        raise UserError(f"data: {folder} has the configurations {sorted(named)}{got}. Choose one: --data_config NAME.")
    entries = named[wanted]["data_files"]
    found: Patterns = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(split, str) or not isinstance(path, str) or not _inside(path):
                raise UserError(
                    f"data: {folder}/README.md, configuration {wanted!r}: data_files must be paths inside the folder. "
                    "Mend it, or give a file."
                )
            found.setdefault(split, []).append(path)
    return found


def _inside(pattern: str) -> bool:
    """Whether a pattern can only match files in its folder.

    >>> _inside("data/train-*.parquet"), _inside("../x.csv"), _inside("https://x/y.csv"), _inside("a::zip://b")
    (True, False, False, False)
    """
    parts = re.split(r"[/\\]", pattern)
    return not (":" in pattern or parts[0] in ("", "~") or ".." in parts)
