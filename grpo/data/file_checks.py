"""Checks of data files before `datasets` reads them: encoding, size of a row, NaN, compression.

One pass over the file, a row at a time. Every error names the file, and the line or the row.
"""

import codecs
import csv
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from grpo.errors import UserError
from grpo.strict_json import check_regular, parse_json, read_object

MAX_ROW_BYTES = 2**24
MAX_JSON_BYTES = 2**30  # a .json file is read at once; .jsonl, .csv and .parquet have no limit
MAX_PARQUET_BYTES = 2**35  # of the decoded cells: a few kilobytes can encode terabytes
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
LFS = b"version https://git-lfs.github.com/spec/"


class BadFile(ValueError):
    """The message names the place in the file and what is wrong there."""


def check_file(path: Path, kind: str) -> list[dict[str, Any]] | None:
    """Refuse a data file that cannot be read completely and unambiguously. Raises UserError.

    kind: json, csv or parquet. Returns the rows of a JSON file, which the check has read; None for the other kinds.
    """
    try:
        if check_regular(path) == 0:
            raise UserError(f"data: {path} is empty. Give a file with at least one question.")
        with path.open("rb") as file:
            head = file.read(512)
        for magic, name in PACKED.items():
            if head.startswith(magic) or head[257:262] == b"ustar":
                raise BadFile(f"it is packed ({name if head.startswith(magic) else 'tar'}); unpack it first")
        if head.startswith(LFS):
            raise BadFile("it is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if kind == "json":
            return _read_json(path)
        {"csv": _check_csv, "parquet": _check_parquet}[kind](path)
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except (OSError, ValueError, OverflowError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"data: {path}: {' '.join(str(error).split())[:300]}. Mend or drop it.") from None


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The rows of JSON lines; or, in a .json file, of one list of objects or one object."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[" or path.suffix.lower() == ".json":
        check_regular(path, MAX_JSON_BYTES)
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        try:
            whole = parse_json(content)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
        else:
            rows = whole if isinstance(whole, list) else [whole]
            for row, cells in enumerate(rows):
                if not isinstance(cells, dict):
                    raise BadFile(f"row {row + 1}: expected an object, got {json.dumps(cells)[:60]}")
                check_cells(cells, f"row {row + 1}")
            return rows
    found = []
    for number, line in _lines(path):
        try:
            cells = parse_json(line)
        except UnicodeDecodeError as error:
            before = re.findall(rb'"([^"\\]{1,60})"\s*:', line[: error.start])
            column = f", column {before[-1].decode()!r}" if before else ""
            raise BadFile(
                f"line {number}{column}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
            ) from None
        except ValueError as error:
            raise BadFile(f"line {number}: not valid JSON: {error}") from None
        if not isinstance(cells, dict):
            raise BadFile(f"line {number}: expected an object, got {json.dumps(cells)[:60]}")
        check_cells(cells, f"line {number}")
        found.append(cells)
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers. Raises BadFile for a line longer than MAX_ROW_BYTES."""
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise BadFile(f"line {number}: longer than {MAX_ROW_BYTES} bytes")
            if line.strip():
                yield number, line


def check_cells(cells: Any, where: str) -> None:
    """Refuse text that UTF-8 cannot encode: JSON can hold half of a surrogate pair, as \\ud800."""
    if isinstance(cells, str):
        try:
            cells.encode()
        except UnicodeEncodeError as error:
            raise BadFile(f"{where}: character {error.start + 1} is half of a surrogate pair") from None
    elif isinstance(cells, dict):
        for key, value in cells.items():
            check_cells(key, where)
            check_cells(value, f"{where}, column {key!r}" if "column" not in where else where)
    elif isinstance(cells, list):
        for value in cells:
            check_cells(value, where)
    elif isinstance(cells, int) and not -(2**63) <= cells < 2**63:
        raise BadFile(f"{where}: a number beyond 64 bits; put it in quotes")


def _check_csv(path: Path) -> None:
    """Column names must differ, rows have at most as many cells, and columns without a name are empty."""
    before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            _check_table(file)
    finally:
        csv.field_size_limit(before)


def _check_table(file: TextIO) -> None:
    def bounded() -> Iterator[str]:
        while line := file.readline(MAX_ROW_BYTES + 1):
            if len(line) > MAX_ROW_BYTES:
                raise BadFile(f"row {reader.line_num + 1}: longer than {MAX_ROW_BYTES} characters")
            yield line

    reader = csv.reader(bounded(), strict=True)
    try:
        header = next((row for row in reader if row), [])
        _check_text(header, [], reader.line_num)
        named = [name for name in header if name.strip()]
        if not named or len(set(named)) != len(named):
            raise BadFile(f"line 1: its column names must be different and not empty, got {str(header)[:100]}")
        for row in reader:
            _check_text(row, header, reader.line_num)
            if len(row) > len(header):
                raise BadFile(f"line {reader.line_num}: {len(row)} cells under {len(header)} columns; quote commas")
            unnamed = [i for i, cell in enumerate(row) if cell.strip() and not header[i].strip()]
            if unnamed:
                raise BadFile(
                    f"line {reader.line_num}, column {unnamed[0] + 1}: {row[unnamed[0]][:60]!r} is in a column "
                    "without a name"
                )
    except csv.Error as error:
        raise BadFile(f"line {reader.line_num}: {error}") from None


def _check_text(row: list[str], header: list[str], line: int) -> None:
    """Refuse cells that are not UTF-8 (such bytes were read as surrogates) or hold NUL."""
    if all(cell.isascii() and "\0" not in cell for cell in row):
        return
    for i, cell in enumerate(row):
        where = f"line {line}, column {header[i]!r}" if i < len(header) else f"line {line}"
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            raise BadFile(f"{where}: not UTF-8 text at character {error.start + 1}; save the file as UTF-8") from None
        if "\0" in cell:
            raise BadFile(f"{where}: it holds a NUL character")


def csv_columns(path: Path) -> dict[str, int]:
    """Column name -> index, for a checked CSV file. Columns without a name are empty and left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(row for row in csv.reader(file, strict=True) if row)
    return {name: i for i, name in enumerate(header) if name.strip()}


def _check_parquet(path: Path) -> None:
    """Decode the file once, a few rows at a time; limit the decoded bytes and validate the cells."""
    with warnings.catch_warnings(), pq.ParquetFile(path) as file:
        warnings.simplefilter("ignore")
        for field in file.schema_arrow:
            kind = (field.metadata or {}).get(b"ARROW:extension:name", b"arrow.json")
            own_type = isinstance(field.type, pa.BaseExtensionType) and not isinstance(field.type, pa.JsonType)
            if own_type or kind != b"arrow.json":
                raise BadFile(f"column {field.name!r} has a type of its own; store text or numbers")
        total = row = 0
        for batch in file.iter_batches(batch_size=256):
            batch.validate(full=True)
            total += batch.nbytes
            row += batch.num_rows
            if total > MAX_PARQUET_BYTES:
                raise BadFile(f"row {row}: more than {MAX_PARQUET_BYTES} bytes when decoded")


def check_saved_folder(path: Path) -> None:
    """Refuse a folder saved by datasets that names files outside of it. Raises UserError."""
    try:
        folders = [path]
        if (path / "dataset_dict.json").exists():
            splits = read_object(path / "dataset_dict.json").get("splits")
            if not isinstance(splits, list) or not all(_is_plain(split) for split in splits):
                raise BadFile("dataset_dict.json: its splits must be plain names")
            folders = [path / split for split in splits]
        for folder in folders:
            for name in ("state.json", "dataset_info.json"):
                if not (folder / name).exists():
                    raise BadFile(f"{folder.name}/{name} is missing: datasets did not save this folder")
            read_object(folder / "dataset_info.json")
            files = read_object(folder / "state.json").get("_data_files")
            if not isinstance(files, list) or not files:
                raise BadFile(f"{folder.name}/state.json lists no files")
            for file in files:
                if not isinstance(file, dict) or not _is_plain(file.get("filename")):
                    raise BadFile(f"{folder.name}/state.json points elsewhere: {str(file)[:80]}")
                check_regular(folder / file["filename"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"data: {path}: {' '.join(str(error).split())[:300]}. Give a folder written by save_to_disk."
        ) from None


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.\- ]{1,200}", name)) and name.strip(". ") != ""
