"""The header of a GGUF file of unknown origin: settings and a table of tensors, each read within bounds.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The libraries that read the tensors later trust the
counts and offsets in the file; here each is compared with the file's size first.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from grpo.strict_json import check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, ARRAY = 8, 9
MAX_DIMENSIONS = 4
MAX_TEXT = 2**24  # bytes of one setting; chat templates are the longest


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights."""

    settings: dict[str, Any]  # arrays: only those of up to 256 numbers; of the others, their length
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> (type, dimensions)

    @property
    def architecture(self) -> str:
        return str(self.settings["general.architecture"])

    @property
    def num_weights(self) -> int:
        """Elements of all tensors but rope_freqs, which is no parameter in transformers."""
        return sum(prod(dims) for name, (_, dims) in self.tensors.items() if name != "rope_freqs.weight")


class _Bytes:
    """A position in a file's bytes. Its methods raise ValueError at the file's end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early, or a length in it is wrong")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > MAX_TEXT:
            raise ValueError(f"it holds a text of {length} bytes, more than {MAX_TEXT}")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if item in NUMBERS:
            width = struct.calcsize(NUMBERS[item])
            content = self.take(count * width)
            return [v for (v,) in struct.iter_unpack(NUMBERS[item], content)] if count <= 256 else count
        if item != TEXT:
            raise ValueError("it holds an array of arrays")
        if count * 8 > len(self.data) - self.at:
            raise ValueError("it ends too early, or a length in it is wrong")
        for _ in range(count):
            self.take(self.number("<Q"))
        return count


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read and check the header. Raises OSError, or ValueError with the reason."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = check_regular(path)
    if not is_gguf(path):
        raise ValueError("it is no GGUF file (its first four bytes are not GGUF)")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Bytes(data)
        reader.take(len(MAGIC))
        version, num_tensors, num_settings = (reader.number(form) for form in ("<I", "<Q", "<Q"))
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version} or of another byte order, allowed: 2, 3")
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            key = reader.text()
            if key in settings:
                raise ValueError(f"its setting {key[:60]!r} occurs twice")
            settings[key] = reader.value(reader.number("<I"))
        if not isinstance(settings.get("general.architecture"), str):
            raise ValueError("it has no general.architecture")
        tensors, ends = {}, 0
        for _ in range(num_tensors):
            name, dimensions = reader.text(), reader.number("<I")
            if dimensions > MAX_DIMENSIONS or name in tensors:
                raise ValueError(f"its tensor {name[:60]!r} has {dimensions} dimensions or occurs twice")
            shape = tuple(reader.number("<Q") for _ in range(dimensions))
            number, offset = reader.number("<I"), reader.number("<Q")
            kinds = {int(kind): kind for kind in GGMLQuantizationType}
            if number not in kinds:
                raise ValueError(f"its tensor {name[:60]!r} has the unknown type {number}")
            block, in_bytes = GGML_QUANT_SIZES[kinds[number]]
            if not shape or min(shape) == 0 or shape[0] % block:
                raise ValueError(f"its tensor {name[:60]!r} has the dimensions {shape}")
            tensors[name] = (kinds[number].name, shape)
            ends = max(ends, offset + prod(shape) // block * in_bytes)
        if ends > size - reader.at:
            raise ValueError("it is cut short: its last weights are missing. Fetch it again")
    return GgufHeader(settings, tensors)
