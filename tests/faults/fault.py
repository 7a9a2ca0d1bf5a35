"""The noun of the fault tests, and what the processes of a run know of each other."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FAULTS = "GRPO_FAULTS"  # the variable with the JSON of `as_json` (tests/faults/rank.py)
EVERY = 10**9


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where, when and how often."""

    kind: str
    phase: str = ""
    rank: int | None = None  # None: every rank
    step: int | None = None  # counted from 1; None: any
    value: float = 0.0  # seconds, rows, bytes, an errno: what `kind` needs
    times: int = 1  # fires at most so often in one process
    after: int = 0  # times that its place is passed before it fires (faults at a phase)


def as_json(faults: Sequence[Fault]) -> str:
    """Faults as text, for another process."""
    return json.dumps([dataclasses.asdict(fault) for fault in faults])


def from_json(text: str) -> list[Fault]:
    """The inverse of `as_json`."""
    return [Fault(**fields) for fields in json.loads(text)]


policies: list[Any] = []  # the policies of this process, for faults and traces that reach into weights
