"""Which cases of a matrix the short tier runs."""

import random
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Collection[Any], count: int = 1, seed: int = 0) -> list[Any]:
    """The same `count` of the cases each time."""
    return random.Random(seed).sample(list(cases), count)


def short(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """The cases as parameters of a test: those outside `chosen` run with --full alone. A case may be a tuple."""
    return [
        case
        if case in chosen
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
        for case in cases
    ]
