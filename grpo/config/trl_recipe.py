"""Options of a recipe of TRL, read one by one, and the settings that they become (from_trl.py)."""

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from grpo.config.checks import shown
from grpo.config.settings import Config
from grpo.config.trl_names import ROWS
from grpo.errors import UserError

MAX_SHOWN = 60
OURS = Config()


def plain(value: Any) -> Any:
    """A value as it is meant: YAML reads 1e-6 as text.

    >>> plain("1e-6"), plain("token")
    (1e-06, 'token')
    """
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.I | re.A)
    return float(value) if is_number else value


def as_number(name: str, value: Any, whole: bool = False) -> Any:
    """A number, or its text. Raises UserError."""
    value = plain(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and -(10**15) < value < 10**15
    if not is_number or (whole and value != int(value)):
        raise UserError(f"{name}: must be a{' whole' if whole else ''} number, got {shown(value)}.")
    return int(value) if whole else value


@dataclass
class Recipe:
    """Options of a recipe, and what has become of them."""

    options: dict[str, Any]
    processes: int
    rows: int | None = None  # questions of the data set
    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)  # settings that hold a default of TRL
    read: set[str] = field(default_factory=set)  # options that have been dealt with

    def get(self, name: str, default: Any = None) -> Any:
        """An option's value; `default` where the recipe has none, or null."""
        self.read.add(name)
        value = self.options.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, whole: bool = False) -> Any:
        """A number. Raises UserError."""
        return as_number(name, self.get(name, default), whole)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value. Raises UserError."""
        value = self.get(name, default)
        value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UserError(f"{name}: must be true or false, got {shown(value)}.")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A mapping, perhaps as text. Raises UserError."""
        value = self.get(name, {})
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
        if not isinstance(value, dict):
            raise UserError(f"{name}: must be a mapping, got {shown(value)}.")
        return value

    def has(self, name: str) -> bool:
        """Whether the recipe sets it."""
        return self.options.get(name) is not None

    def put(self, setting: str, value: Any, *given_by: str) -> None:
        """Write a setting. One that no option gives is a default of TRL: it is written where ours differs."""
        if not any(map(self.has, given_by)):
            if getattr(OURS, setting, None) == value:
                return
            self.defaults.append(setting)
        self.settings[setting] = value

    def lose(self, name: str, advice: str = "") -> None:
        """Say that an option is not carried over."""
        value = self.options.get(name)
        advice = advice or (ROWS[name].note if name in ROWS else "It is none of TRL's options.")
        self.lost.append(f"{name}: {' '.join(shown(value).split())[:MAX_SHOWN]}. {advice}")
