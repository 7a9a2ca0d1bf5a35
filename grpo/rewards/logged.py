"""What a reward function gets and gives beside scores, as in TRL: the trainer's state, and what it wants logged.

    trainer_state.global_step     steps that are finished
    log_extra(column, values)     one value for each completion of the call: a column of the completions log
    log_metric(name, value)       averaged over the calls of all ranks: the metric user/NAME

A function gets those that it names, and, if it takes any keyword, those that its text mentions. What it logs travels
with its scores, as JSON; other objects become text.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TAKEN = ("trainer_state", "log_extra", "log_metric")
MAX_NAMES = 64  # of columns, and of metrics, in one call
MAX_NAME = 100  # characters
MAX_VALUES = 4096  # of one metric in one call
MAX_BYTES = 1 << 18  # of JSON that one call logs


@dataclass(frozen=True)
class TrainerState:
    """Where the run is; the same on every rank."""

    global_step: int = 0  # steps that are finished: 0 in the first one
    max_steps: int = 0  # of the whole run


def taken(function: Callable[..., Any]) -> tuple[str, ...]:
    """Which of these arguments a function gets; none for a callable without a signature."""
    try:
        arguments = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    text = ""
    if any(one.kind is one.VAR_KEYWORD for one in arguments.values()):
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = ""
    return tuple(name for name in TAKEN if name in arguments or name in text)


class Log:
    """What one call logs; `extra` and `metric` are passed to it as log_extra and log_metric."""

    def __init__(self, num_completions: int):
        self.num_completions = num_completions
        self.columns: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}
        self.size = 0

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Raises ValueError for another number of values than completions, and for too much."""
        values = [_plain(value) for value in values]
        if len(values) != self.num_completions:
            raise ValueError(
                f"log_extra({str(column)[:40]!r}): {len(values)} values for {self.num_completions} completions"
            )
        self._count("log_extra", column, self.columns, len(json.dumps(values)))
        self.columns[column] = values

    def metric(self, name: str, value: float) -> None:
        """Raises ValueError for what is no finite number, and for too much."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({str(name)[:40]!r}): got {number}, expected a finite number")
        self._count("log_metric", name, self.metrics, 32)
        if len(self.metrics.setdefault(name, [])) >= MAX_VALUES:
            raise ValueError(f"log_metric({name!r}): more than {MAX_VALUES} values in one call")
        self.metrics[name].append(number)

    def _count(self, what: str, name: str, known: Mapping[str, Any], size: int) -> None:
        if not is_name(name):
            raise ValueError(f"{what}: the name must be 1 to {MAX_NAME} printable characters, got {str(name)[:40]!r}")
        self.size += size
        if name not in known and len(known) >= MAX_NAMES:
            raise ValueError(f"{what}: more than {MAX_NAMES} names in one call")
        if self.size > MAX_BYTES:
            raise ValueError(f"{what}: more than {MAX_BYTES >> 10} KiB in one call")

    def beside(self, outcomes: list[Any]) -> Any:
        """The call's answer: its outcomes alone, or with what it logged."""
        if not self.columns and not self.metrics:
            return outcomes
        return {"scores": outcomes, "columns": self.columns, "metrics": self.metrics}


def is_name(name: Any) -> bool:
    """Whether something can name a column or a metric."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def is_logged(columns: Any, metrics: Any, num_completions: int) -> bool:
    """Whether this can have been logged by one call; it comes from a worker, which is not trusted."""
    if not (isinstance(columns, dict) and isinstance(metrics, dict) and all(map(is_name, [*columns, *metrics]))):
        return False
    if max(len(columns), len(metrics)) > MAX_NAMES:
        return False
    if not all(isinstance(values, list) and len(values) == num_completions for values in columns.values()):
        return False
    return all(
        isinstance(values, list) and all(isinstance(one, float) and math.isfinite(one) for one in values)
        for values in metrics.values()
    )


def _plain(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, numbers that are not finite and other objects as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value).encode("utf-8", "backslashreplace").decode()


@dataclass
class Logs:
    """What the reward functions of this rank logged in a step or an evaluation."""

    columns: dict[int, dict[str, Any]] = field(default_factory=dict)  # row -> column -> value
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self, function: str, rows: Sequence[int], columns: Mapping[str, list[Any]], metrics: Mapping[str, Any]
    ) -> None:
        """Add what one call logged. A column of a name that another function took stands under FUNCTION.NAME."""
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        for column, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                of_row = self.columns.setdefault(row, {})
                of_row[f"{function}.{column}" if column in of_row else column] = value

    def sums(self) -> dict[str, tuple[float, int]]:
        """Sum and number of each metric's values."""
        return {name: (math.fsum(values), len(values)) for name, values in sorted(self.metrics.items())}


def means(parts: Sequence[Mapping[str, Sequence[float]]], prefix: str = "user/") -> dict[str, float]:
    """The mean of each metric over all ranks. parts: `sums` of each.

    >>> means([{"length": (6.0, 2)}, {"length": (0.0, 1), "odd": (1.0, 1)}])
    {'user/length': 2.0, 'user/odd': 1.0}
    """
    names = sorted({name for part in parts for name in part})
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {f"{prefix}{name}": math.fsum(s for s, _ in of) / sum(n for _, n in of) for name, of in found.items()}
