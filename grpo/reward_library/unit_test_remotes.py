"""What stands in a test for the code it tests, which runs in another process (solution_process.py) and is not trusted.

Numbers, texts and containers come as plain data. Any other object stays there: here it can be called, iterated and
asked for its attributes, but it equals no plain data, and Python's own rules compare it.
"""

import builtins
import contextlib
import sys
from types import ModuleType
from typing import Any

from grpo.reward_library import solution_process
from grpo.reward_library.solution_process import decode, encode

NOT_RAISED = (StopIteration, StopAsyncIteration, GeneratorExit)  # the code could end a loop of the test with them


class Remotes:
    """The test's side of the pipes to the code's process, which is not trusted."""

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = requests, replies

    def names(self) -> list[str] | None:
        """The names that the code defines; None where it does not load."""
        found = solution_process.read(self.replies)
        names = found.get("names") if isinstance(found, dict) else None
        usable = isinstance(names, list) and all(isinstance(one, str) and one.isidentifier() for one in names)
        return names if usable else None

    def ask(self, what: str, number: int, name: str | None = None, given: Any = (), named: Any = None) -> Any:
        """The result of one request. Raises what the code raised, as a built-in exception."""
        arguments = [encode(one, _number) for one in given]
        keywords = {key: encode(one, _number) for key, one in (named or {}).items()}
        solution_process.write(self.requests, [what, number, name, arguments, keywords])
        reply = solution_process.read(self.replies)
        if not isinstance(reply, dict):
            raise RuntimeError("the code gave no reply")
        if "error" in reply:
            raise _exception(*reply["error"])
        if reply.get("stop") is True and what == "next":
            raise StopIteration
        if "module" in reply:
            return _own_module(reply["module"])
        for one, change in zip(given, reply.get("arguments") or (), strict=False):
            if change is not None:
                _replace(one, decode(change, self.remote))
        return decode(reply["value"], self.remote)

    def remote(self, number: int) -> "Remote":
        """What stands for an object of the code."""
        return Remote(self, number)


def _number(value: Any) -> int:
    if not isinstance(value, Remote):
        raise TypeError(f"a {type(value).__name__} cannot be passed to the code")
    return object.__getattribute__(value, "_number")


def _exception(name: Any, text: Any) -> Exception:
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED):
        with contextlib.suppress(TypeError):  # it needs more than a text
            return kind(str(text))
    return RuntimeError(f"{name}: {text}")


def _own_module(name: Any) -> Any:
    if isinstance(name, str) and name.partition(".")[0] in sys.stdlib_module_names:
        import importlib

        return importlib.import_module(name)
    raise AttributeError(f"the code's module {name!r} is not passed on")


def _replace(argument: Any, changed: Any) -> None:
    """Give an argument the content that the code left in it, as a call in one process would."""
    if type(argument) is not type(changed) or argument == changed:
        return
    if isinstance(argument, list):
        argument[:] = changed
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(changed)


class Remote:
    """An object of the code that is no plain data. It equals only itself, and what compares it is Python's own."""

    def __init__(self, remotes: Remotes, number: int):
        self._remotes, self._number = remotes, number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remotes.ask("get", self._number, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._remotes.ask("call", self._number, None, given, named)

    def __iter__(self) -> Any:
        return self._remotes.ask("iter", self._number)

    def __next__(self) -> Any:
        return self._remotes.ask("next", self._number)

    def __len__(self) -> int:
        try:
            return self._remotes.ask("call", self._number, "__len__")
        except AttributeError:  # list() asks, and goes on without where there is none
            raise TypeError("it has no length") from None

    def __getitem__(self, key: Any) -> Any:
        return self._remotes.ask("call", self._number, "__getitem__", [key])

    def __str__(self) -> str:
        return str(self._remotes.ask("call", self._number, "__str__"))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> Any:
        return (
            self._remotes.ask("call", self._number, "__eq__", [other]) if isinstance(other, Remote) else NotImplemented
        )

    def __hash__(self) -> int:
        return self._number


class RemoteModule(ModuleType):
    """What `import solution` gives a test."""

    def __init__(self, remotes: Remotes):
        super().__init__("solution")
        self.__dict__["_remotes"] = remotes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remotes.ask("get", 0, name)
