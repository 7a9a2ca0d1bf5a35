"""A model folder, and stand-ins of a rollout server with that model (tests/support/rollout_server.py)."""

import pytest

from tests.support.rollout_server import StandIn
from tests.support.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served"), spread=2.0)


@pytest.fixture(scope="session")
def all_stand_ins(tiny_folder, tmp_path_factory):
    """Two servers."""
    return [StandIn(tiny_folder, tmp_path_factory.mktemp("server")) for _ in range(2)]


@pytest.fixture
def stand_in(all_stand_ins):
    """stand_in(): a server that has just started. They end with the test."""
    free = list(all_stand_ins)

    def start() -> StandIn:
        server = free.pop()
        server.behave()
        server.revive(kept=False)
        return server

    yield start
    for server in all_stand_ins:
        server.die()
