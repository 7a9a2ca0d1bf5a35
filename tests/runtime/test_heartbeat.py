"""The watchdog: what is progress, and what is not. Whole runs that hang are in tests/faults/test_stops.py."""

import time

import pytest
import torch

from grpo.runtime import heartbeat as heartbeats
from grpo.runtime.distributed import World
from grpo.runtime.heartbeat import ENDED, Heartbeat, Watchdog

TIMEOUT_S = 1.0


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A heartbeat that nobody moves, and the moments at which its watchdog took it for a stall."""
    stalls = []
    monkeypatch.setattr(Watchdog, "_stall", lambda self: stalls.append(time.monotonic()))
    heartbeat = Heartbeat(tmp_path, World(0, 1, 0, 1, torch.device("cpu")))
    heartbeat(5, "rollout")
    watchdog = Watchdog(heartbeat, TIMEOUT_S, on_stall=lambda line: None)
    watchdog.start()
    yield heartbeat, tmp_path, stalls
    watchdog.stop()
    watchdog.join()


def test_nothing_moves(watched):
    time.sleep(2.5 * TIMEOUT_S)
    assert watched[2], "the control of the tests below"


@pytest.mark.parametrize("what", ["tokens", "a checkpoint on a slow disk"])
def test_progress_is_no_stall(watched, what):
    heartbeat, folder, stalls = watched
    (folder / ".tmp-checkpoint_5" / "trainer").mkdir(parents=True)
    for i in range(25):
        if what == "tokens":
            heartbeat.beat()
        else:
            (folder / ".tmp-checkpoint_5" / "trainer" / "optimizer").write_bytes(b"x" * i)
        time.sleep(TIMEOUT_S / 10)
    assert stalls == []


def test_who_is_gone_and_who_has_left(tmp_path):
    """A rank whose process is no more is missed; one that left in good order is not."""
    heartbeat = Heartbeat(tmp_path, World(0, 2, 0, 2, torch.device("cpu")))
    heartbeat(7, "reward")
    other = Heartbeat(tmp_path, World(1, 2, 1, 2, torch.device("cpu")))
    other(7, "update")
    file = tmp_path / ".ranks" / "rank_1.json"
    file.write_text(file.read_text().replace(f'"pid": {heartbeat.read(1)["pid"]}', '"pid": 4194305'))  # beyond any
    assert heartbeat.gone(wait_s=0.0) == ["rank 1 is gone, last in phase update, step 7"]
    file.write_text(file.read_text().replace("update", ENDED))
    assert heartbeat.gone(wait_s=0.0) == []


def test_a_rank_that_leaves_while_it_is_looked_at_is_not_gone(tmp_path, monkeypatch):
    """Its file was read before its last word, and its process after that."""
    heartbeat = Heartbeat(tmp_path, World(0, 2, 0, 2, torch.device("cpu")))
    other = Heartbeat(tmp_path, World(1, 2, 1, 2, torch.device("cpu")))
    heartbeat(0, "start")
    other(0, "start")
    leaving = []

    def state_of(pid):
        leaving.append(pid)
        if len(leaving) == 2:  # of the other rank
            other.leave()
        return "Z" if len(leaving) == 2 else "R"

    monkeypatch.setattr(heartbeats, "state_of", state_of)
    assert heartbeat.gone(wait_s=0.0) == [] and len(leaving) == 2
