"""Rows of a file, a folder of files, a folder saved by `datasets`, or a hub dataset.

Every value is the one that its own row holds: a column of a JSON file may mix types, and a column that `datasets`
stores as JSON is decoded, at any depth. Local files are checked before `datasets` reads them, and nothing in them is
executed: `datasets` runs no loading scripts any more, and a folder is opened either as written by `save_to_disk` or as
plain data files.
"""

import dataclasses
import glob
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from grpo.config.names import find_path
from grpo.data.file_checks import check_cells, check_file, check_saved_folder, csv_columns
from grpo.data.folders import files_of
from grpo.errors import UserError
from grpo.models import hub
from grpo.strict_json import parse_json

FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Rows:
    """Rows whose columns may hold values of any type, with what is needed of the interface of datasets.Dataset.

    Arrow gives a column one type: it would turn 2 beside 2.5 into 2.0, and a column of dates into points in time.
    """

    def __init__(self, columns: dict[str, list[Any]], count: int):
        self.columns, self.count = columns, count

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "Rows":
        """From one dict a row; a column that a row lacks is None there."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        return cls({name: [row.get(name) for row in rows] for name in names}, len(rows))

    @property
    def column_names(self) -> list[str]:
        """All of them."""
        return list(self.columns)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: cells[row] for name, cells in self.columns.items()} for row in range(self.count))

    def to_list(self) -> list[dict[str, Any]]:
        """One dict a row."""
        return list(self)

    def select(self, indices: Iterable[int]) -> "Rows":
        """Some of the rows."""
        chosen = list(indices)
        return Rows({name: [cells[row] for row in chosen] for name, cells in self.columns.items()}, len(chosen))

    def rename_column(self, old: str, new: str) -> "Rows":
        """With another name for a column."""
        return Rows({new if name == old else name: cells for name, cells in self.columns.items()}, self.count)


def load_rows(name: str, split: str, config: str | None = None) -> datasets.Dataset | Rows:
    """The rows of a file, a folder or a hub dataset. Raises UserError."""
    path = find_path(name)
    try:
        if path is None:
            return _plain(_from_hub(name, split, config))
        if path.is_dir():
            saved = any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
            return _plain(_saved(path, split)) if saved else _read(*files_of(path, split, config, FILE_READERS))
        reader = FILE_READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"data: {name}: unknown file type {path.suffix!r}, allowed are {', '.join(FILE_READERS)}.")
        return _read([path], reader)
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


def _read(files: Sequence[Path], reader: str) -> datasets.Dataset | Rows:
    """The rows of files of one kind, all of them checked first."""
    checked = [check_file(file, reader) for file in files]
    if reader == "json":
        return Rows.of([row for rows in checked for row in rows or []])
    options = _csv_as_text(files) if reader == "csv" else {}
    names = [glob.escape(str(file)) for file in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about columns of mixed types
        return _plain(datasets.load_dataset(reader, data_files=names, split="train", **options))


def _csv_as_text(files: Sequence[Path]) -> dict[str, Any]:
    """Options that read all CSV cells as text (007, 1.50, NA) and leave columns without a name out."""
    columns = csv_columns(files[0])
    for file in files[1:]:
        if csv_columns(file) != columns:
            raise UserError(f"data: {files[0]} and {file} are parts of one split with different columns. Mend one.")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "usecols": list(columns.values()), "keep_default_na": False, "encoding": "utf-8-sig"}


def _plain(rows: datasets.Dataset) -> datasets.Dataset | Rows:
    """Rows as plain values: without a stored format, JSON decoded, and nothing else, which could open other files."""
    rows.data.validate(full=True)  # offsets and UTF-8, before the cells are read
    rows = rows.with_format(None)
    for column, feature in rows.features.items():
        raw = _undecoded(feature)
        if raw != feature:
            rows = rows.cast_column(column, raw)
    if not any(_holds_json(feature) for feature in rows.features.values()):
        return rows
    columns = {name: _decoded_column(rows[name], feature, name) for name, feature in rows.features.items()}
    return Rows(columns, len(rows))


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return _is_json(feature) or (_is_list(feature) and _holds_json(feature.feature))


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"  # older versions of datasets have no such feature


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (datasets.List, datasets.LargeList))


def _decoded_column(cells: Iterable[Any], feature: Any, name: str) -> list[Any]:
    if not _holds_json(feature):
        return list(cells)
    values = []
    for row, cell in enumerate(cells):
        where = f"row {row + 1}, column {name!r}"
        try:
            values.append(_decoded(cell, feature))
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        check_cells(values[-1], where)
    return values


def _decoded(cell: Any, feature: Any) -> Any:
    """A cell with its JSON decoded, at any depth. Raises ValueError."""
    if cell is None:
        return None
    if isinstance(feature, dict):
        return {key: _decoded(cell[key], inner) for key, inner in feature.items()}
    if _is_list(feature):
        return [_decoded(each, feature.feature) for each in cell]
    return parse_json(cell) if _is_json(feature) else cell


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if _is_list(feature):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if getattr(feature, "decode", False) is True else feature
