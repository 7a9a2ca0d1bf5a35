"""Names of columns with dots: `reward_model.ground_truth` is the key ground_truth in the mappings of reward_model."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def column_of(columns: Collection[str], name: str) -> tuple[str, list[str]] | None:
    """The column that a name stands for, and the keys within its cells; None: there is none.

    A column of that very name comes first, then the one with the longest name.

    >>> column_of(["a", "a.b"], "a.b.c"), column_of(["a"], "a"), column_of(["a"], "b.c")
    (('a.b', ['c']), ('a', []), None)
    """
    words = name.split(".")
    for end in range(len(words), 0, -1):
        column = ".".join(words[:end])
        if column in columns and all(words[end:]):
            return column, words[end:]
    return None


def part(cell: Any, keys: Sequence[str]) -> Any:
    """What stands in a cell under keys; None where a mapping or its key is missing.

    >>> part({"a": {"b": 1}}, ["a", "b"]), part("text", ["a"]), part(2, [])
    (1, None, 2)
    """
    for key in keys:
        cell = cell.get(key) if isinstance(cell, Mapping) else None
    return cell


def cells_of(columns: Mapping[str, Sequence[Any]], name: str) -> list[Any]:
    """All cells of a column, or of a part of it. Raises LookupError with the reason, in words."""
    found = column_of(columns, name)
    if found is None:
        raise LookupError(f"has no column {name!r}, only {list(columns)}")
    column, keys = found
    cells = columns[column]
    for done, key in enumerate(keys):
        within = [part(cell, keys[:done]) for cell in cells]
        known = list(dict.fromkeys(str(one) for cell in within if isinstance(cell, Mapping) for one in cell))
        if key not in known:
            where = ".".join([column, *keys[:done]])
            raise LookupError(f"has no key {key!r} in column {where!r}, only {known[:20]}")
    return [part(cell, keys) for cell in cells]


def cell_of(columns: Mapping[str, Any], name: str) -> Any:
    """The cell of one row. Raises LookupError with the reason, in words."""
    return cells_of({column: [cell] for column, cell in columns.items()}, name)[0]
