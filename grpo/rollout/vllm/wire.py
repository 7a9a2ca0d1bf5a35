"""What the trainer and a rollout server write and read: arrays in JSON, and a stream of named tensors.

A stream of tensors is a sequence of frames, each one header and its bytes, and a last frame without bytes:

    length of the header (8 bytes, little endian) | header, JSON: name, dtype, shape, checksum | the tensor's bytes
    length of the header                          | header, JSON: count

A stream without its last frame is one that broke off; it is refused as a whole.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from grpo.runtime.checksums import checksum

PROTOCOL = 3
"""Number of this protocol; a server and a trainer of different numbers do not work together."""

TOKEN_VARIABLE = "GRPO_SERVER_TOKEN"
"""Environment variable that holds the secret of a server, on both sides."""

DRAW = "draw"  # key of the arguments of a row's draw (inside.py)
IN_SUPPORT = -1e30  # what stands for the log-prob of an id that could have been drawn
NOT_FINITE = 1.0  # and of a token whose logits were not finite: no log-prob is positive

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER_BYTES = 1 << 16
PIECE_BYTES = 1 << 22  # of a tensor, sent at once


class BadStream(ValueError):
    """A stream of tensors that is incomplete or malformed."""


def describe(error: BaseException) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def vocabulary_of(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens, in the order of their ids."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return hashlib.sha256("\0".join(map(str, tokens)).encode("utf-8", "replace")).hexdigest()


def packed(values: Any, dtype: str) -> str:
    """An array as base64 of its little-endian bytes, in the order of its elements.

    >>> unpacked(packed([1, 2, 3], "<i4"), "<i4").tolist()
    [1, 2, 3]
    """
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def unpacked(text: str, dtype: str) -> np.ndarray:
    """The inverse of `packed`, one dimension. Raises ValueError."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)


def packed_support(kept: Sequence[Sequence[int] | np.ndarray]) -> dict[str, str]:
    """The ids that each token was drawn from, as fields of a line.

    >>> unpacked_support(packed_support([[4, 9], [], [7]]), 3).tolist()
    [[4, 9, -1], [-1, -1, -1], [7, -1, -1]]
    """
    flat = np.concatenate([np.zeros(0), *kept])
    return {"kept": packed([len(ids) for ids in kept], "<i4"), "support": packed(flat, "<i4")}


def unpacked_support(line: dict[str, Any], width: int) -> np.ndarray:
    """The inverse, [C, width], padded with -1. Raises KeyError, TypeError or ValueError."""
    kept, ids = unpacked(line["kept"], "<i4"), unpacked(line["support"], "<i4")
    if kept.min(initial=0) < 0 or kept.max(initial=0) > width or kept.sum() != len(ids):
        raise ValueError(f"a support of {len(ids)} ids in {len(kept)} tokens, at most {width} each")
    support = np.full((len(kept), width), -1, np.int32)
    support[np.arange(width) < kept[:, None]] = ids
    return support


def frames(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """The stream of these tensors, in pieces of at most PIECE_BYTES; one tensor at a time is copied to the CPU."""
    count = 0
    for name, tensor in tensors:
        flat = tensor.detach().contiguous().cpu().view(-1)
        yield _header(header_of(name, tensor.shape, flat))
        data = flat.view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]
        count += 1
    yield _header({"count": count})


def header_of(name: str, shape: Iterable[int], flat: Tensor) -> dict[str, Any]:
    """The header of a tensor with these elements."""
    dtype = str(flat.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(shape), "checksum": int(checksum(flat))}


def _header(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Frame:
    """Where a tensor stands in a stored stream."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int
    start: int  # byte

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def index_of(path: Path) -> list[Frame]:
    """The tensors of a stored stream, from its headers. Raises BadStream unless it is complete."""
    size, found = path.stat().st_size, list[Frame]()
    with path.open("rb") as file:
        while True:
            header = _read_header(file)
            if "count" in header:
                if header["count"] != len(found) or file.tell() != size:
                    raise BadStream(f"{len(found)} tensors in {size} bytes, where {header['count']} were announced")
                return found
            found.append(frame_of(header, len(found), file.tell()))
            if found[-1].length > size - file.tell():
                raise BadStream(f"it ends inside {found[-1].name[:200]}")
            file.seek(found[-1].length, 1)


def read_frames(path: Path, index: list[Frame], changed: list[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a stored stream, one after another. changed: gets the names of those that were changed."""
    with path.open("rb") as file:
        for frame in index:
            file.seek(frame.start)
            data = bytearray(frame.length)
            file.readinto(data)
            flat = torch.frombuffer(data, dtype=frame.dtype) if data else torch.empty(0, dtype=frame.dtype)
            if int(checksum(flat)) != frame.checksum:
                changed.append(frame.name)
            yield frame.name, flat.view(frame.shape)


def frame_of(header: dict[str, Any], number: int, start: int = 0) -> Frame:
    """What the header of a tensor says. Raises BadStream."""
    name, dtype, shape, total = (header.get(key) for key in ("name", "dtype", "shape", "checksum"))
    known = isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES and isinstance(total, int)
    if not known or not _is_shape(shape):
        raise BadStream(f"tensor {number} has the header {str(header)[:200]}")
    return Frame(str(name), DTYPES[str(dtype)], tuple(shape or ()), int(total or 0), start)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """The header that begins here; the file stands behind it afterwards."""
    at = file.tell()
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if not text or len(text) < length:
        raise BadStream(f"it breaks off after {at} bytes")
    return parse_header(text, f"at byte {at}")


def parse_header(text: bytes, where: str) -> dict[str, Any]:
    """A header's fields. Raises BadStream."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BadStream(f"no header {where}")
    return header
