"""The ready configurations, each run for a few steps with a small model, and every finding that is true of such a run."""

from tests.doctor.cases import Case

READY: dict[str, Case] = {}
