"""An accelerator that is none: device "emulated", torch's PrivateUse1 backend on host memory (device.cpp).

For tests without a GPU: its values are the CPU's, its rules a GPU's. Tensors of two devices do not mix, with CUDA's own
exceptions (numbers without dimensions in pointwise operators, indices of `x[...]` from the CPU); what a GPU would wait
for is counted, by line of the caller; new memory is NaN; autocast has CUDA's lists; backward runs in its own thread.

It cannot show: kernels and their limits (types, shapes, alignment, rounding of bf16), streams and races, CUDA graphs,
how much memory is used, NCCL.

`register` changes torch for the whole process, so that tests register it in a process of their own.
"""

import ctypes
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
WAITING = [  # their result has a size that the host must know, or is a number
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
    """Why it cannot be built here; "": it can."""
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
    """The operators that CUDA lets take numbers from the CPU: those whose devices torch's wrappers do not compare."""
    import torchgen  # late, as below: seldom needed

    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    functions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [f["func"].partition("(")[0] for f in functions if f.get("device_check") == "NoCheck"]


class Reads:
    """What a GPU would have waited for, as (what, where): how often."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return sum(self.seen.values())

    def of(self, *names: str) -> int:
        """How many of these kinds."""
        return sum(count for (what, _), count in self.seen.items() if what in names)


_listening: list[Reads] = []


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _heard(what: bytes) -> None:
    for reads in _listening:
        reads.seen[what.decode(), _asked(sys._getframe(1))] += 1


def _asked(frame: FrameType | None) -> str:
    """The line of the product that asks, or else of a test; "" in a thread of the device."""
    asks = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS) or (not asks and "site-packages" not in file):
            asks = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.startswith(OURS):
            break
        frame = frame.f_back
    return asks


@contextmanager
def counted() -> Iterator[Reads]:
    """Counts while it is open: "item", "nonzero" and the like, "to host", "to device" (and ", not waited for")."""
    reads = Reads()
    _listening.append(reads)
    try:
        yield reads
    finally:
        _listening.remove(reads)


def _device_module() -> ModuleType:
    """What torch asks as `torch.emulated`."""
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


def register() -> torch.device:
    """Build it (minutes the first time, then it is in torch's cache of extensions) and make it known; the device."""
    if not _device:
        from torch.utils import cpp_extension

        torch.utils.rename_privateuse1_backend(NAME)
        source = Path(__file__).with_name("device.cpp")
        library = cpp_extension.load(f"grpo_{NAME}", [str(source)], extra_cflags=["-O1"], is_python_module=False)
        torch.ops.emulated_device.set_rules(pointwise(), WAITING)
        ctypes.CDLL(library).emulated_device_listen(_heard)
        torch._register_device_module(NAME, _device_module())
        torch.utils.generate_methods_for_privateuse1_backend()
        _device.append(torch.device(NAME, 0))
    return _device[0]
