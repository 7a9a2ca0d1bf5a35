"""The process that holds a model's code while its unit tests run elsewhere (unit_tests.py).

    python -I solution_process.py FD [FD FD]    file descriptors: what to do, a frame of JSON; requests and replies

It confines itself before the code runs: limits, and, where the kernel has Landlock, no file but Python's own and those
of its working folder, no network, no signal to other processes. The tests are never here: they ask over a pipe, and get
plain data, so neither comparisons nor assertions can be changed by the code. It imports nothing of the project.
"""

import builtins
import ctypes
import os
import resource
import struct
import sys
import sysconfig
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

MAX_FRAME = 1 << 20
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
WITH_TEXT: dict[str, Any] = {"Decimal": Decimal, "Fraction": Fraction, "bytes": bytes.fromhex, "complex": complex}
READ, LIST, EXECUTE = 1 << 2, 1 << 3, 1 << 0  # Landlock's rights
RULESET, RULE, RESTRICT = 444, 445, 446  # its system calls, of these numbers on every machine


def encode(value: Any, keep: Any) -> Any:
    """Plain data as JSON, with the kind of each container; `keep(value)` gives the number of anything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, str):
        return str(value)
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode(one, keep) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(one, keep)] for key, one in value.items()]}
    if isinstance(value, (Decimal, Fraction, complex)):
        return {type(value).__name__: str(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if hasattr(value, "tolist") and not isinstance(value, type):
        return encode(value.tolist(), keep)
    return {"object": keep(value)}


def decode(value: Any, kept: Any) -> Any:
    """What `encode` was given; `kept(number)` gives the rest. Raises ValueError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("no plain data")
    [(kind, inner)] = value.items()
    if kind == "object" and type(inner) is int:
        return kept(inner)
    if kind in CONTAINERS and isinstance(inner, list):
        return CONTAINERS[kind]([decode(one, kept) for one in inner])
    if kind == "dict" and isinstance(inner, list):
        return {decode(key, kept): decode(one, kept) for key, one in inner}
    if kind in ("int", "float", *WITH_TEXT) and isinstance(inner, str):
        if kind == "int":
            return int(inner, 16)
        return float.fromhex(inner) if kind == "float" else WITH_TEXT[kind](inner)
    raise ValueError("no plain data")


def read(fd: int) -> Any:
    """The next frame; None at the end, or where it is too long."""
    import json

    head = _exactly(fd, 4)
    size = struct.unpack(">I", head)[0] if head else MAX_FRAME + 1
    body = _exactly(fd, size) if size <= MAX_FRAME else None
    return None if body is None else json.loads(body)


def _exactly(fd: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            return None
        data += part
    return data


def write(fd: int, value: Any) -> None:
    """Write one frame."""
    import json

    body = json.dumps(value).encode()
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def confine(seconds: int, memory_mb: int) -> None:
    """Limit this process and its children, for good."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {
        resource.RLIMIT_AS: mapped + (memory_mb << 20),
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, value in wanted.items():
        _, hard = resource.getrlimit(what)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (most, most))
    _landlock()


def _landlock() -> bool:
    """Whether the kernel now refuses files, network and signals; see landlock(7)."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = (1 << {1: 13, 2: 14}.get(version, 15)) - 1  # of files: later versions know more
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", rights, network, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = libc.syscall(RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    paths = sysconfig.get_paths()
    readable = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    readable |= {os.path.join(root, "lib") for root in (sys.prefix, sys.base_prefix, "/usr", "/usr/local", "/")}
    readable |= {"/lib64", "/usr/lib64", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/etc/ld.so.cache"}
    for path in [os.getcwd(), *sorted(readable)]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = rights if path == os.getcwd() else READ | EXECUTE | (LIST if os.path.isdir(path) else 0)
        libc.syscall(RULE, rules, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which Landlock asks for
    return libc.syscall(RESTRICT, rules, 0) == 0


class Objects:
    """What the tests may ask for: the code's module is number 0."""

    def __init__(self, module: ModuleType):
        self.kept: list[Any] = [module]

    def keep(self, value: Any) -> int:
        """The number under which it can be asked for."""
        self.kept.append(value)
        return len(self.kept) - 1

    def answer(self, request: Any) -> Any:
        """The reply to one request: [what, number, name, arguments, keywords]."""
        what, number, name, arguments, keywords = request
        target = self.kept[number]
        if what == "get":
            value = getattr(target, name)
            module = value.__name__ if isinstance(value, ModuleType) else None
            return {"module": module} if module else {"value": encode(value, self.keep)}
        if what == "next":
            try:
                return {"value": encode(next(target), self.keep)}
            except StopIteration:
                return {"stop": True}
        given = [decode(one, self.kept.__getitem__) for one in arguments]
        named = {key: decode(one, self.kept.__getitem__) for key, one in keywords.items()}
        value = iter(target) if what == "iter" else (getattr(target, name) if name else target)(*given, **named)
        changed = [encode(one, self.keep) if isinstance(one, (list, dict, set)) else None for one in given]
        return {"value": encode(value, self.keep), "arguments": changed}


def error_of(error: BaseException) -> Any:
    """An exception as its nearest built-in class and its text."""
    names = [one.__name__ for one in type(error).__mro__ if getattr(builtins, one.__name__, None) is one]
    return {"error": [names[0], str(error)[:300]]}


def main() -> None:
    """Read what to do, confine this process, run the code, and answer."""
    first, *pipes = map(int, sys.argv[1:])
    sys.argv[1:] = []
    what = read(first)
    os.close(first)
    confine(what["seconds"], what["memory_mb"])
    module = ModuleType("__main__" if what["as_program"] else "solution")
    sys.modules[module.__name__] = module
    code = compile(what["code"], "<solution>", "exec")
    if what["as_program"]:
        exec(code, module.__dict__)
        return
    requests, replies = pipes
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # SystemExit too
        write(replies, error_of(error))
        return
    objects = Objects(module)
    write(replies, {"names": [name for name in vars(module) if not name.startswith("__")]})
    while (request := read(requests)) is not None:
        try:
            reply = objects.answer(request)
        except BaseException as error:  # whatever the code raises
            reply = error_of(error)
        write(replies, reply)


if __name__ == "__main__":
    main()
