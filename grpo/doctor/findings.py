"""What a rule returns, and how all rules are asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo.doctor.recording import Recording, Row


@dataclass(frozen=True)
class Evidence:
    """A rule's numbers, by the names in its texts, and a completion that shows it."""

    values: dict[str, Any] = field(default_factory=dict)
    example: Row | None = None
    why: str | None = None  # key in WHY of the texts: why the example got no reward


Rule = Callable[[Recording], Evidence | None]  # None: there is nothing to find, or nothing to tell it by


@dataclass(frozen=True)
class Finding:
    """A rule that found something."""

    rule: str
    evidence: Evidence


def diagnose(run: Recording, rules: dict[str, Rule]) -> list[Finding]:
    """Ask every rule, in the order of the table."""
    return [Finding(name, found) for name, rule in rules.items() if (found := rule(run)) is not None]
