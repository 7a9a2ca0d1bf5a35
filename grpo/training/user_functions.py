"""Functions of the user's own, named as `path.py:function` by a setting: how they are found, called and refused.

A file is imported once in a run, in the trainer's own process, and its text is a part of the run's fingerprint.
user_surrogate.py and user_table_functions.py say what the functions of each setting get and must return.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from grpo.config.names import find_path
from grpo.errors import UserError
from grpo.rewards.functions import load_module

MAX_REASON = 300  # characters of an exception's text


@dataclass(frozen=True)
class UserFunction:
    """A function of a user's file."""

    setting: str  # that names it
    value: str  # of the setting: path.py:function
    function: Callable[..., Any]
    source: str  # text of the file

    def call(self, **arguments: Any) -> Any:
        """Raises UserError when the function raises."""
        try:
            return self.function(**arguments)
        except Exception as error:
            raise UserError(f"{self.setting}: {self.value} raised {_reason(error)}. Fix it.") from None

    def array(self, returned: Any, shape: tuple[int, ...], each: str, kind: type = np.float64) -> np.ndarray:
        """What it returned, as an array of this shape and type. Raises UserError when it is something else."""
        try:
            array = np.asarray(returned)
            fits = array.shape == shape and (array.dtype == bool) == (kind is bool)
            found = str(list(array.shape))
            array = array.astype(kind)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            fits, found = False, type(returned).__name__
        if not fits:
            types = "true or false" if kind is bool else "numbers"
            raise self.wrong(f"must return {each}, {types} of shape {list(shape)}, got {found}.")
        return array

    def wrong(self, problem: str) -> UserError:
        """The error that says what is wrong with the function."""
        return UserError(f"{self.setting}: {self.value} {problem} See docs/algorithms.md.")


@functools.cache
def load_user_function(setting: str, value: str) -> UserFunction:
    """The function that a setting names. Raises UserError."""
    file, _, name = value.rpartition(":")
    path = find_path(file)
    if path is None or not path.is_file() or path.suffix != ".py":
        raise UserError(f"{setting}: no such Python file {file[:200]!r}. Write path/to/file.py:function.")
    try:
        module, text = _import(path.resolve())
    except Exception as error:
        raise UserError(f"{setting}: {file} cannot be imported: {_reason(error)}.") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{setting}: {file} has no function {name[:60]!r}. Write path/to/file.py:function.")
    return UserFunction(setting, value, function, text)


@functools.cache  # a file is read once in a run, even if it changes later or several settings name it
def _import(path: Path) -> tuple[ModuleType, str]:
    text = importlib.util.decode_source(path.read_bytes())
    return load_module(f"functions_from_{path.stem}", str(path), text), text


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON]}"
