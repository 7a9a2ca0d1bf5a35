"""An emulated accelerator: device "emulated", torch's PrivateUse1 backend on host memory (device.cpp).

It is for tests without a GPU: values are the CPU's, rules a GPU's. Tensors of two devices do not mix, with CUDA's own
exceptions (scalar tensors in pointwise operators, indices of `x[...]` from the CPU); device syncs are counted, by line
of the caller; new memory is NaN; autocast has CUDA's lists; backward runs in its own thread.

It cannot test kernels and their limits (types, shapes, alignment, rounding of bf16), streams and races, CUDA graphs,
memory use, NCCL.

`register` changes torch for the whole process; tests call it in a process of their own.
"""

import ctypes
import hashlib
import importlib.util
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

import torch
import yaml

NAME = "emulated"
WAITING = [  # device syncs: the size of their result depends on values, or it is a Python number
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "equal",
    "multinomial",
]
OURS = str(Path(__file__).resolve().parents[2] / "grpo")


def missing() -> str:
    """Why the device cannot be built on this machine; "": it can."""
    if shutil.which("g++") is None:
        return "no C++ compiler (g++) here"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python headers here"
    if shutil.which("ninja") is None:
        return "no ninja here"
    if importlib.util.find_spec("setuptools") is None:
        return "no setuptools here: torch builds extensions with it"
    return ""


def pointwise() -> list[str]:
    """Operators that accept scalar tensors of the CPU on CUDA: torch's wrappers do not check their devices."""
    import torchgen  # late, as below: needed once

    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    functions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [f["func"].partition("(")[0] for f in functions if f.get("device_check") == "NoCheck"]


class Reads:
    """Counts of device syncs, by (kind, line of code)."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return sum(self.seen.values())

    def of(self, *names: str) -> int:
        """Number of syncs of these kinds."""
        return sum(count for (what, _), count in self.seen.items() if what in names)


_counting: list[Reads] = []


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _on_sync(kind: bytes) -> None:
    for reads in _counting:
        reads.seen[kind.decode(), _caller(sys._getframe(1))] += 1


def _caller(frame: FrameType | None) -> str:
    """The line of grpo/ that causes the sync, or else of a test; "" in a thread of the device."""
    line = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS) or (not line and "site-packages" not in file):
            line = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.startswith(OURS):
            break
        frame = frame.f_back
    return line


@contextmanager
def counted() -> Iterator[Reads]:
    """Count syncs in a block, by kind: "item", "nonzero" and others, "to host", "to device" (", not waited for")."""
    reads = Reads()
    _counting.append(reads)
    try:
        yield reads
    finally:
        _counting.remove(reads)


def _device_module() -> ModuleType:
    """The module `torch.emulated`, whose functions torch calls."""
    module = ModuleType(f"torch.{NAME}")
    generator = torch.Generator(NAME)
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": generator.manual_seed,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16, torch.float32],
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


_device: list[torch.device] = []


def _library() -> str:
    """Load the library, built anew only for another source or another torch; torch itself compares file times."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("device.cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    name = f"grpo_{NAME}_{digest}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    complete, library = folder / "complete", folder / f"{name}.so"
    if complete.exists() and library.exists():
        torch.ops.load_library(str(library))
        return str(library)
    built = cpp_extension.load(name, [str(source)], extra_cflags=["-O1"], is_python_module=False)
    complete.touch()
    return str(built)


def register() -> torch.device:
    """Build and register the device; the build takes half a minute once."""
    if not _device:
        torch.utils.rename_privateuse1_backend(NAME)
        library = _library()
        torch.ops.emulated_device.set_rules(pointwise(), WAITING)
        ctypes.CDLL(library).emulated_device_listen(_on_sync)
        torch._register_device_module(NAME, _device_module())
        torch.utils.generate_methods_for_privateuse1_backend()
        _device.append(torch.device(NAME, 0))
    return _device[0]
