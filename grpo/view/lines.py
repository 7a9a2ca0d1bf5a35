"""JSON lines of unknown origin, read as they grow: a partial last line waits, a bad line is counted and left out."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 2**22  # bytes read at once
MAX_LINE = 2**26  # bytes; a longer line is left out
TAIL = 64  # bytes before the place reached: another content there means that the file was written anew
FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file that is no symbolic link. Raises OSError."""
    handle = os.open(path, FLAGS)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes, no symbolic link. Raises OSError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return data


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None where there is none. Bytes that are not UTF-8 become U+FFFD.

    >>> parse_line(b'{"step": 1}'), parse_line(b'{"step": '), parse_line(b"[1]")
    ({'step': 1}, None, None)
    """
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def whole_number(value: Any, most: int = 2**31 - 1) -> int | None:
    """The value where it is a whole number from 0 to `most`, else None."""
    return value if type(value) is int and 0 <= value <= most else None


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number.

    >>> number(2), number(None), number(True), number(10**400)
    (2.0, nan, nan, nan)
    """
    try:
        return float(value) if type(value) in (int, float) else float("nan")
    except OverflowError:
        return float("nan")


class GrowingFile:
    """Complete lines of a file that another process may append to, cut or replace."""

    def __init__(self, path: Path):
        self.path = path
        self.done = 0  # bytes of complete lines read
        self.tail = b""  # the last of them
        self.rest = 0  # bytes after them: a line that is still being written, or was never finished
        self.inode: int | None = None
        self.too_long = 0

    def was_rewritten(self) -> bool:
        """Whether what was read is no longer there: a resumed run drops lines, thinning replaces the file."""
        if self.inode is None:
            return False
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.done:
                    return True
                file.seek(self.done - len(self.tail))
                return file.read(len(self.tail)) != self.tail
        except OSError:
            return False  # it cannot be read now: what was read stays

    def new_lines(self) -> Iterator[tuple[int, bytes]]:
        """Place and bytes of each complete line after those already returned. Raises OSError."""
        with open_regular(self.path) as file:
            self.inode = os.fstat(file.fileno()).st_ino
            file.seek(self.done)
            begun = b""
            while True:
                block = file.read(BLOCK)
                *lines, begun = (begun + block).split(b"\n")
                for line in lines:
                    place, self.done = self.done, self.done + len(line) + 1
                    self.tail = (line + b"\n")[-TAIL:]
                    yield place, line
                if not block:
                    break
                if len(begun) > MAX_LINE:
                    begun = self._skip_line(file, len(begun))
            self.rest = len(begun)

    def _skip_line(self, file: BinaryIO, skipped: int) -> bytes:
        """Pass over a line of which `skipped` bytes were read; what follows it in the block that ends it."""
        self.too_long += 1
        while block := file.read(BLOCK):
            end = block.find(b"\n")
            if end >= 0:
                self.done += skipped + end + 1
                self.tail = block[: end + 1][-TAIL:]
                return block[end + 1 :]
            skipped += len(block)
        self.too_long -= 1  # it has no end yet
        return b""

    def at(self, places: list[tuple[int, int]]) -> list[bytes]:
        """The bytes at (place, size), each. Raises OSError."""
        with open_regular(self.path) as file:
            found = []
            for place, size in places:
                file.seek(place)
                found.append(file.read(size))
        return found
