"""One reward function: importing it, one call, what counts as a score. Runs in the worker; plain Python only.

The file is imported from the text that was read when the run started, so a worker that is replaced in the middle of a
run gets the same function even when the file has changed. So are the modules beside it (neighbours.py).
"""

import contextlib
import difflib
import importlib.abc
import importlib.util
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from grpo.config.trl_rewards import BY_NAME
from grpo.rewards import ANSWER_MARKS, REFUSAL_SCORE, REFUSAL_TEXT
from grpo.rewards.coroutines import is_async, run_together, wait_for
from grpo.rewards.logged import TAKEN, Log, TrainerState, taken

RewardFunction = Callable[..., Sequence[float | None]]
Outcome = float | str | None  # a score, why there is none, or "does not apply"

LARGEST = 1e100  # squares and weighted sums of scores stay finite
MAX_REASON = 300  # characters
MAX_SCORES = 2**16  # read from an iterator, which may have no end
MAX_NAMES = 8  # functions named in the error about a missing one
ARGUMENTS = ("prompts", "completions", "completion_ids", *TAKEN)  # passed in every call, or to who takes them


class TextLoader(importlib.abc.InspectLoader):
    """Imports a file from the text that was read when the run started."""

    def __init__(self, path: str, text: str):
        self.path, self.text = path, text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.text, self.path)

    def get_filename(self, fullname: str) -> str:
        return self.path

    def is_package(self, fullname: str) -> bool:
        return self.path.endswith("__init__.py")


def load_module(module_name: str, path: str, text: str) -> ModuleType:
    """Import the file. Raises whatever the file's code raises."""
    spec = importlib.util.spec_from_file_location(module_name, path, loader=TextLoader(path, text))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # as an import would: dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def find(module: ModuleType, function: str) -> RewardFunction | str:
    """The function; or, as a str, that the file does not have it, and the names it has."""
    found = getattr(module, function, None)
    if callable(found):
        return found
    if function in BY_NAME:
        return f"has no function {function!r}, a name of TRL or open-r1. {BY_NAME[function].advice()}"
    names = sorted(n for n, value in vars(module).items() if callable(value) and _looks_like_a_reward(n, value))
    near = difflib.get_close_matches(function, names, MAX_NAMES, cutoff=0.0)
    if len(near) == len(names):
        return f"has no function {function!r}. It has: {', '.join(names)}."
    return f"has no function {function!r}. The nearest of its {len(names)}: {', '.join(near)}."


def _looks_like_a_reward(name: str, value: Any) -> bool:
    return name.endswith("reward") or (
        inspect.isfunction(value) and "completions" in inspect.signature(value).parameters
    )


def bind(function: RewardFunction, given: dict[str, Any]) -> tuple[RewardFunction, str]:
    """A function with its parameters set, and the text that its `prepare` adds to the run's fingerprint.

    Parameters are the arguments named in the function's attribute `parameters`, which then never come from a data
    column; without that attribute, all arguments with a default. Raises ValueError for an unknown parameter; whatever
    `prepare` raises passes through.
    """
    named = getattr(function, "parameters", None)
    defaults = _defaults(function)
    allowed = [name for name in defaults if name not in ARGUMENTS and (named is None or name in named)]
    unknown = next((name for name in given if name not in allowed), None)
    if unknown is not None:
        raise ValueError(f"it has no parameter {unknown!r}. It has: {', '.join(allowed) or 'none'}.")
    values = {name: defaults[name] for name in allowed if named is not None} | given
    prepare = getattr(function, "prepare", None)
    more_source = (prepare(**values) if callable(prepare) else None) or ""
    if not values:
        return function, more_source

    def bound(**arguments: Any) -> Sequence[float | None]:
        return function(**{**arguments, **values})

    return bound, more_source


def _defaults(function: RewardFunction) -> dict[str, Any]:
    """Arguments with a default, and their defaults; empty for a callable without a signature."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {one.name: one.default for one in arguments if one.default is not one.empty}


def describe(function: RewardFunction, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the trainer needs to know of a function: the fields of Reward. given: its parameters from the settings."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # a callable object, or a function made at run time
        source = name
    marks = {mark: bool(getattr(function, mark, False)) for mark in ("sees_group", "runs_code", "reads_gold")}
    values = {
        "worth_of_refusal": _worth_of_refusal(function, given or {}),
        "right": float(getattr(function, "right", 1.0)),
        "marks": _answer_marks(function, given or {}),
        "if_ended": getattr(function, "if_ended", None) if marks["runs_code"] else None,
        "takes": taken(function),
        "needs": [name for name in _needed(function) if name not in (given or {})],
        "is_async": is_async(function),
    }
    return {**marks, "source": source, **values}


def _needed(function: RewardFunction) -> list[str]:
    """Arguments that only a data column can give: without a default, and none that every call passes."""
    try:
        arguments = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return []
    named = [one for one in arguments if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return [one.name for one in named if one.default is one.empty and one.name not in ARGUMENTS]


def _answer_marks(function: RewardFunction, given: Mapping[str, Any]) -> list[str] | None:
    """The texts around the answer, where the function has them as parameters."""
    values = [{**_defaults(function), **given}.get(name) for name in ANSWER_MARKS]
    return [str(value) for value in values] if all(isinstance(value, str) for value in values) else None


def _worth_of_refusal(function: RewardFunction, given: Mapping[str, Any]) -> float:
    """The score of a refusal: as given; else the default, where the function has a parameter for its text too."""
    defaults = _defaults(function)
    default = defaults.get(REFUSAL_SCORE) if REFUSAL_TEXT in defaults else None
    value = given.get(REFUSAL_SCORE, default)
    return float(value) if isinstance(value, (int, float)) else 0.0


@dataclass
class Arguments:
    """What a call gets."""

    prompts: list[Any]
    completions: list[Any]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]
    state: TrainerState = field(default_factory=TrainerState)
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.log = Log(len(self.completions))

    def passed(self, takes: Sequence[str]) -> dict[str, Any]:
        """All by keyword. takes: the names of TRL's further arguments that the function gets."""
        further = {"trainer_state": self.state, "log_extra": self.log.extra, "log_metric": self.log.metric}
        own = {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.token_ids}
        return {**self.columns, **own, **{name: further[name] for name in takes}}


@dataclass(frozen=True)
class Loaded:
    """A function as it is called."""

    function: RewardFunction
    takes: Sequence[str] = ()
    is_async: bool = False
    visible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # imports beside its file

    @classmethod
    def of(cls, function: RewardFunction) -> "Loaded":
        """Of one that needs nothing beside its file."""
        return cls(function, taken(function), is_async(function))


def call(one: Loaded, arguments: Arguments) -> list[Outcome]:
    """Score completions in one call: one outcome each. A BaseException such as SystemExit passes through."""
    wanted = len(arguments.completions)
    try:
        with one.visible():
            scores = one.function(**arguments.passed(one.takes))
            return weigh(wait_for(scores) if inspect.isawaitable(scores) else scores, wanted)
    except Exception as error:  # a user's function may raise anything; the run decides, not the exception
        return [raised(error)] * wanted


def call_together(
    calls: Sequence[tuple[Loaded, Arguments]],
    done: Callable[[int, list[Outcome] | None], None],
    timeouts_s: Sequence[float] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Await coroutines of one file at the same time. See `run_together`."""

    def outcomes(one: Loaded, arguments: Arguments) -> Callable[[], Coroutine[Any, Any, list[Outcome]]]:
        async def begin() -> list[Outcome]:
            wanted = len(arguments.completions)
            try:
                scores: Any = one.function(**arguments.passed(one.takes))
                return weigh(await scores, wanted)
            except BaseException as error:  # SystemExit too: it would end the loop
                return [raised(error)] * wanted

        return begin

    with calls[0][0].visible():
        run_together([outcomes(*one) for one in calls], done, timeouts_s, stop)


def weigh(scores: Any, wanted: int) -> list[Outcome]:
    """The outcomes of a call, from what the function returned for `wanted` completions.

    >>> weigh([1, None, True, "2"], 4)
    [1.0, None, 1.0, 2.0]
    >>> weigh([float("nan")], 1)
    ['returned nan, expected a finite number']
    """
    kind = type(scores).__name__
    if hasattr(scores, "tolist"):  # an array or tensor, on any device; one of shape [n, 1] is a list of numbers too
        scores = scores.tolist()
        if isinstance(scores, list):
            scores = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in scores]
    if isinstance(scores, (str, bytes, Mapping, Set)) or not isinstance(scores, Iterable):
        return [f"returned {kind}, expected a list of numbers or None"] * wanted
    scores = scores if isinstance(scores, Sequence) else list(itertools.islice(scores, MAX_SCORES))
    if len(scores) != wanted:
        return [f"returned {len(scores)} scores for {wanted} completions"] * wanted
    return [_weigh_one(score) for score in scores]


def _weigh_one(score: Any) -> Outcome:
    if score is None:
        return None
    try:
        value = float(score)
    except Exception:  # its __float__ may be the user's code
        return f"returned {_shown(score)}, expected a number or None"
    if not math.isfinite(value):
        return f"returned {value}, expected a finite number"
    if abs(value) > LARGEST:
        return f"returned {value}, expected a number between -{LARGEST:g} and {LARGEST:g}"
    return value


def raised(error: BaseException) -> str:
    """One line about an exception, also where its own text raises."""
    try:
        text = str(error)
    except Exception as second:  # its __str__ is the user's code too
        text = f"(no text: {type(second).__name__})"
    advice = _about_missing_module(error)
    return f"{type(error).__name__}: {text}"[: MAX_REASON - len(advice)] + advice


def _about_missing_module(error: BaseException) -> str:
    """What to do when a module of the reward file is not there; empty for other exceptions."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if type(name) is not str or not re.fullmatch(r"[\w.]{1,60}", name):
        return ""
    package, _, inner = name.partition(".")
    if inner:
        return f"; the {package} that is installed lacks it, so install the version that the file needs"
    return f"; install it (pip install {name}, where its package has that name), or put {name}.py beside the file"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # its __repr__ is the user's code too
        text = f"{type(value).__name__} (no repr: {type(error).__name__})"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
