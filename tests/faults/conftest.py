"""Fixtures of the fault tests: one arena for all of them, and the lines of the report."""

import json
import os
from pathlib import Path

import pytest

from tests.faults.report import LINES
from tests.faults.runs import Arena


def pytest_collection_modifyitems(config, items):
    """The long tier tries everything: what it samples in the short one need not run twice."""
    if config.getoption("--full"):
        items[:] = [item for item in items if not item.name.startswith("test_F") or "[sample]" not in item.name]


@pytest.fixture(scope="session")
def arena(tmp_path_factory):
    """A tiny model with its data, and the fork server that starts runs on it. Nothing may outlive the fault tests."""
    arena = Arena(tmp_path_factory.mktemp("faults"))
    yield arena
    for job in arena.fork_server.jobs:
        job.kill()
    left = arena.fork_server.orphans()
    assert left == [], "processes without a running job"


@pytest.fixture
def record(request):
    """record(fault, tries, held, figure): a line of the report, and the test's verdict: all tries have to hold."""

    def write(fault: str, tries: int, held: int, figure: str) -> None:
        assert request.node.name.startswith(f"test_{fault}_"), "a row is recorded by the test of its name"
        line = {"fault": fault, "tries": tries, "held": held, "figure": figure, "test": request.node.nodeid}
        if LINES in os.environ:
            with Path(os.environ[LINES]).open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert tries > 0 and held == tries, f"{fault}: {held} of {tries} held; {figure}"

    return write
