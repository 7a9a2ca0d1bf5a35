"""Rows of a file, a folder of files, a folder saved by `datasets`, or a hub dataset.

Local files are checked before `datasets` reads them, and nothing in them is executed: `datasets` runs no loading
scripts any more, and a folder is opened either as written by `save_to_disk` or as plain data files.
"""

import dataclasses
import glob
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from grpo.config.settings import find_path
from grpo.data.file_checks import check_file, check_saved_folder, csv_columns
from grpo.data.folders import files_of
from grpo.errors import UserError
from grpo.models import hub

FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """The rows of a file, a folder or a hub dataset. Raises UserError."""
    path = find_path(name)
    try:
        if path is None:
            return _plain(_from_hub(name, split, config))
        if path.is_dir():
            saved = any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
            return _plain(_saved(path, split) if saved else _read(*files_of(path, split, config, FILE_READERS)))
        reader = FILE_READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"data: {name}: unknown file type {path.suffix!r}, allowed are {', '.join(FILE_READERS)}.")
        return _plain(_read([path], reader))
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen exception classes
        raise UserError(
            f"data: {name!r} could not be read: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from None


def _from_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    if name.startswith((".", "/", "~")) or Path(name).suffix in FILE_READERS:
        raise UserError(f"data: no such file {name!r}. Give a file, a folder with data, or a hub name.")
    hub.check_dataset(name)
    try:
        return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise hub.no_cached_dataset(name) or error from None


def _saved(path: Path, split: str) -> datasets.Dataset:
    """The rows of a folder that save_to_disk wrote."""
    check_saved_folder(path)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"data: {path} has no split {split!r}, only {sorted(loaded)}. Use --data_split.")
        return loaded[split]
    return loaded


def _read(files: Sequence[Path], reader: str) -> datasets.Dataset:
    """The rows of files of one kind, all of them checked first."""
    for file in files:
        check_file(file, reader)
    options = _csv_as_text(files) if reader == "csv" else {}
    names = [glob.escape(str(file)) for file in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about columns of mixed types
        return datasets.load_dataset(reader, data_files=names, split="train", **options)


def _csv_as_text(files: Sequence[Path]) -> dict[str, Any]:
    """Options that read all CSV cells as text (007, 1.50, NA) and leave columns without a name out."""
    columns = csv_columns(files[0])
    for file in files[1:]:
        if csv_columns(file) != columns:
            raise UserError(f"data: {files[0]} and {file} are parts of one split with different columns. Mend one.")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "usecols": list(columns.values()), "keep_default_na": False, "encoding": "utf-8-sig"}


def _plain(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows as plain values: without a stored format, and without decoding, which could open other files."""
    rows.data.validate(full=True)  # offsets and UTF-8, before the cells are read
    rows = rows.with_format(None)
    for column, feature in rows.features.items():
        raw = _undecoded(feature)
        if raw != feature:
            rows = rows.cast_column(column, raw)
    return rows


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if getattr(feature, "decode", False) is True else feature
