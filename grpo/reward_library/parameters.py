"""Declaring the parameters of a reward function, and checks of their values, which raise ValueError."""

import math
from collections.abc import Callable
from typing import Any

ADVICE = "Change it in reward_parameters."


def declare(function: Callable[..., Any], prepare: Callable[..., Any] | None = None, **marks: bool) -> None:
    """Mark a reward function: its keyword-only arguments are parameters; `prepare` gets them when a worker starts."""
    defaults = getattr(function, "__kwdefaults__", None) or {}
    for name, value in {**marks, "parameters": tuple(defaults), "prepare": prepare}.items():
        setattr(function, name, value)


def check_number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    """Refuse what is no number strictly between `low` and `high`; `allowed` says it in words.

    >>> check_number("refuse", 0.2, 0.25, 1.0, "above 1/options and below 1")
    Traceback (most recent call last):
    ValueError: refuse must be a number above 1/options and below 1, got 0.2. Change it in reward_parameters.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low < value < high:
        raise ValueError(f"{name} must be a number {allowed}, got {str(value)[:60]}. {ADVICE}")


def check_whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    """Refuse what is no whole number from `low` to `high`.

    >>> check_whole("options", 1, 2, 26)
    Traceback (most recent call last):
    ValueError: options must be a whole number from 2 to 26, got 1. Change it in reward_parameters.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:60]}. {ADVICE}")


def check_text(name: str, value: Any) -> None:
    """Refuse what is no text, or blank.

    >>> check_text("marker", "")
    Traceback (most recent call last):
    ValueError: marker must be text, and not blank, got ''. Change it in reward_parameters.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, and not blank, got {str(value)[:60]!r}. {ADVICE}")


def check_choice(name: str, value: Any, allowed: list[str]) -> None:
    """Refuse what is none of `allowed`.

    >>> check_choice("language", "xx", ["en", "zh"])
    Traceback (most recent call last):
    ValueError: language must be one of en, zh, got 'xx'. Change it in reward_parameters.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {str(value)[:60]!r}. {ADVICE}")
