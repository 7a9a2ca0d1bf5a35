"""Weights that travel as broadcasts (rollout_transfer: broadcast): what arrives, and one line for what goes wrong."""

import threading
import time

import pytest
import torch

from grpo.rollout.vllm import broadcast, transfer
from grpo.rollout.vllm.client import ServerProblem
from grpo.rollout.vllm.shared_buffer import BUFFER_BYTES, SharedLine
from tests.rollout.vllm.asking import Trainer, assert_equal
from tests.support.rollout_server import Died


@pytest.fixture(params=[False, True], ids=["others' servers", "own servers"])
def trainer(request, tiny_folder, stand_in):
    """trainer(number of servers): a trainer, and its servers; those that it started share memory with it."""

    def make(number=1, **settings):
        servers = [stand_in() for _ in range(number)]
        return Trainer(tiny_folder, servers, own=request.param, rollout_transfer="broadcast", **settings), servers

    return make


def counted(server, answers=lambda path: None):
    """The requests that a server gets. answers: another answer than its own."""
    asked = []

    def before(path):
        asked.append(path)
        return answers(path)

    server.before = before
    return asked


def test_completions_are_the_native_engines(trainer):
    """On two servers, after two transfers through one group; each server holds the trainer's weights."""
    own, servers = trainer(2)
    control = own.native()
    asked = counted(servers[0])
    for _ in range(2):
        own.update()
        own.send()
    assert not own.problems
    assert asked.count("/group") == 1 and asked.count("/broadcast") == 2 and asked.count("/weights") == 0
    ours = own.sample()
    assert_equal(ours, own.native())
    assert [one.token_ids.tolist() for one in control] != [one.token_ids.tolist() for one in ours]
    for server in servers:
        for name, parameter in own.model.named_parameters():
            assert torch.equal(server.loads[-1][name], parameter)


def test_memory_is_shared_with_own_servers_alone(trainer):
    own, _ = trainer()
    own.send()
    assert isinstance(own.engine.send.__self__.group.group, SharedLine) == (own.cfg.rollout_server is None)


def test_a_server_that_vanishes_is_noticed_by_its_answer(tiny_folder, stand_in):
    """It takes no turn any more and tells the store nothing: only its connection breaks."""
    server = stand_in()
    own = Trainer(tiny_folder, [server], own=True, rollout_transfer="broadcast", rollout_timeout_s=60.0)

    def vanishes(tensors):
        next(tensors)
        server.change_broadcast = lambda rest: rest
        server.group.group.abort = lambda: None
        raise Died

    server.change_broadcast = vanishes
    named = [(f"w{n}", torch.randn(BUFFER_BYTES // 8)) for n in range(6)]
    began = time.monotonic()
    (outcome,) = own.engine.send(iter(named), "v")
    assert isinstance(outcome, ServerProblem) and time.monotonic() - began < 20


def test_a_restarted_server_joins_again(trainer):
    own, (server,) = trainer()
    own.send()
    server.die()
    server.revive(kept=False)
    own.update()
    own.send()
    assert not own.problems
    assert_equal(own.sample(), own.native())


def test_trainers_in_turn(tiny_folder, stand_in):
    """Two trainers take the server from each other; each samples its own weights after its own transfer."""
    server = stand_in()
    both = [Trainer(tiny_folder, [server], rollout_transfer="broadcast") for _ in range(2)]
    for each in (*both, *both):
        each.update()
        each.update()
        each.send()
        assert not each.problems
        assert_equal(each.sample(), each.native())
    both[0].sample()  # nothing was sent: the other's weights are there
    assert "lost the weights" in both[0].problems[0]


def dies_inside(server):
    """After three tensors, once; it starts again at once, without weights."""

    def change(tensors):
        for number, each in enumerate(tensors):
            if number == 3:
                server.change_broadcast = lambda rest: rest
                server.die()
                server.revive(kept=False)
                raise Died
            yield each

    return change


def test_a_server_that_dies_inside_a_transfer(trainer):
    """The transfer is repeated, through a new group, on both servers."""
    own, servers = trainer(2)
    servers[1].change_broadcast = dies_inside(servers[1])
    own.update()
    own.send()
    assert not own.problems
    assert_equal(own.sample(), own.native())


def test_a_tensor_that_arrives_changed_is_sent_again(trainer, monkeypatch):
    """Once: the next try is whole. Always: one line, and no completion."""
    own, (server,) = trainer()
    told, left = broadcast.header_of, [1]

    def lies(name, *rest):
        wrong = "o_proj" in name and left and left.pop() is not None
        return told(name, *rest) | ({"checksum": 7} if wrong else {})

    monkeypatch.setattr(broadcast, "header_of", lies)
    own.update()
    own.send()
    assert not own.problems and not left
    assert_equal(own.sample(), own.native())
    left += range(10**3)
    own.update()
    own.send()
    (line,) = own.problems
    assert server.url in line and "arrived changed" in line and own.sample() == []


REFUSALS = {  # what answers otherwise -> (path, answer, words, times asked)
    "no group": ("/group", (500, b'{"error": "process group: no route to host"}'), "no route to host", 3),
    "an old server": ("/group", (404, b"{}"), "no rollout server", 1),
    "another token": ("/group", (401, b"{}"), "the token", 1),
    "not in the group": ("/broadcast", (500, b'{"error": "it is not in the group"}'), "not in the group", 3),
    "nonsense": ("/broadcast", (200, b'{"version": 3}'), "did not begin to receive", 3),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_server_refuses(trainer, case, number):
    """One line with its address; every tensor was read, as ranks with shards of it need."""
    path, answer, words, times = case
    own, servers = trainer(number)
    asked = counted(servers[-1], lambda asked_path: answer if asked_path == path else None)
    read = []
    own.update()

    def weights():
        for name, value in own.model.named_parameters():
            read.append(name)
            yield name, value

    own.engine.load_weights(weights, 1)
    (line,) = own.problems
    assert servers[-1].url in line and words in line and "\n" not in line
    assert asked.count(path) == times
    assert len(read) == times * len(list(own.model.named_parameters()))
    assert own.sample() == []


def test_a_server_that_never_enters_is_waited_for_no_longer_than_allowed(trainer, monkeypatch):
    own, (server,) = trainer(rollout_timeout_s=1.0)
    monkeypatch.setattr(transfer, "END_S", 0.5)
    silent = threading.Event()
    counted(server, lambda path: silent.wait(5) and None if path == "/group" else None)
    own.send()
    silent.set()
    (line,) = own.problems
    assert server.url in line
