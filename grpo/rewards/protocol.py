"""Frames between trainer, supervisors and workers: four bytes of length, then that many bytes, mostly JSON.

Floats are sent as their shortest repr and come back bit-equal. Values of data columns that JSON cannot express (bytes,
dates, times, Decimal) are sent with a tag. Reading a frame never executes code.
"""

import base64
import datetime
import json
import os
import struct
from collections.abc import Callable
from decimal import Decimal
from typing import Any

LENGTH = struct.Struct(">I")
MAX_REQUEST = 1 << 30  # bytes of one frame towards a worker
MAX_ANSWER = 1 << 20  # bytes of one frame from a worker, which is not trusted

READERS: dict[str, Callable[[Any], Any]] = {
    "\0bytes": base64.b64decode,
    "\0datetime": datetime.datetime.fromisoformat,
    "\0date": datetime.date.fromisoformat,
    "\0time": datetime.time.fromisoformat,
    "\0timedelta": lambda parts: datetime.timedelta(*parts),
    "\0decimal": Decimal,
    "\0object": dict,
}


def _tag(value: Any) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"\0bytes": base64.b64encode(value).decode()}
    if isinstance(value, datetime.datetime):  # before date, of which it is a subclass
        return {"\0datetime": value.isoformat()}
    if isinstance(value, datetime.date):
        return {"\0date": value.isoformat()}
    if isinstance(value, datetime.time):
        return {"\0time": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {"\0timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, Decimal):
        return {"\0decimal": str(value)}
    raise TypeError(f"a value of type {type(value).__name__} cannot be passed to a reward worker")


def _escaped(value: Any) -> Any:
    """The value, with every object that looks like a tag wrapped into a tag of its own."""
    if isinstance(value, dict):
        inner = {key: _escaped(item) for key, item in value.items()}
        looks_like_a_tag = len(inner) == 1 and next(iter(inner)) in READERS
        return {"\0object": [list(item) for item in inner.items()]} if looks_like_a_tag else inner
    return [_escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


def _untag(pairs: dict[str, Any]) -> Any:
    if len(pairs) == 1:
        [(key, value)] = pairs.items()
        if key in READERS:
            return READERS[key](value)
    return pairs


def dump(value: Any) -> bytes:
    """The value as JSON. Raises TypeError, ValueError or RecursionError for one that cannot be sent.

    >>> load(dump([0.1, None, b"x", {"a": (1, 2)}]))
    [0.1, None, b'x', {'a': [1, 2]}]
    """
    text = json.dumps(value, default=_tag, separators=(",", ":"))
    if '{"\\u0000' in text:  # a tag, or a column that looks like one
        text = json.dumps(_escaped(value), default=_tag, separators=(",", ":"))
    return text.encode()


def load(data: bytes) -> Any:
    """The value of `dump`'s JSON. Raises ValueError or RecursionError for anything that is not JSON."""
    return json.loads(data, object_hook=_untag)


def frame(data: bytes) -> bytes:
    """The bytes as one frame."""
    return LENGTH.pack(len(data)) + data


def cut(data: bytes) -> list[bytes]:
    """Split consecutive frames, and remove their lengths.

    >>> cut(frame(b"a") + frame(b"") + frame(b"bc"))
    [b'a', b'', b'bc']
    """
    frames, at = [], 0
    while at < len(data):
        size = LENGTH.unpack_from(data, at)[0]
        frames.append(data[at + LENGTH.size : at + LENGTH.size + size])
        at += LENGTH.size + size
    return frames


def read_frame(fd: int, cap: int) -> bytes | None:
    """Wait for the next frame; None at the end of the stream. Raises ValueError when it is longer than `cap`."""
    head = _read_exactly(fd, LENGTH.size)
    if head is None:
        return None
    [size] = LENGTH.unpack(head)
    if size > cap:
        raise ValueError(f"a frame of {size} bytes, allowed are {cap}")
    return _read_exactly(fd, size)


def _read_exactly(fd: int, size: int) -> bytes | None:
    parts, missing = [], size
    while missing:
        part = os.read(fd, min(missing, 1 << 20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data, in several calls where needed."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Splitter:
    """Cuts a stream that arrives in pieces into frames."""

    def __init__(self, cap: int):
        self.cap = cap
        self.buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append a piece of the stream."""
        self.buffer += data

    def next(self) -> bytes | None:
        """The next whole frame, or None. Raises ValueError when its length exceeds `cap`."""
        if len(self.buffer) < LENGTH.size:
            return None
        [size] = LENGTH.unpack_from(self.buffer)
        if size > self.cap:
            raise ValueError(f"a frame of {size} bytes, allowed are {self.cap}")
        end = LENGTH.size + size
        if len(self.buffer) < end:
            return None
        found = bytes(self.buffer[LENGTH.size : end])
        del self.buffer[:end]
        return found
