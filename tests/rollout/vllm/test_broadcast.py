"""Weights that travel as broadcasts (rollout_transfer: broadcast): what arrives, and one line for what goes wrong."""

import json
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.rollout.vllm import broadcast, transfer
from grpo.rollout.vllm.broadcast import BrokeOff, Group, Place
from grpo.rollout.vllm.shared_buffer import BUFFER_BYTES, SharedBuffer
from grpo.rollout.vllm.wire import BadStream
from grpo.runtime.checksums import checksum
from tests.rollout.vllm.asking import Trainer, assert_equal
from tests.rollout.vllm.test_wire import tensors
from tests.support.jobs import PROJECT
from tests.support.rollout_server import Died

CPU = torch.device("cpu")


def members(number, timeout_s=20.0, backend="gloo", devices=(CPU, CPU, CPU)):
    """A trainer's end of a group, and those of `number` servers' processes."""
    listening = socket.create_server(("127.0.0.1", 0))
    buffer = SharedBuffer.create(devices[0]) if backend == "shared" else None
    handle = buffer and buffer.handle
    place = Place("a group", "127.0.0.1", listening.getsockname()[1], 1 + number, backend, timeout_s, handle)
    store = dist.TCPStore(
        place.host,
        place.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=20),
        master_listen_fd=listening.detach(),
    )
    ends = []
    joining = [
        threading.Thread(target=lambda device: ends.append(Group.join(place, device)), args=(devices[1 + n],))
        for n in range(number)
    ]
    for thread in joining:
        thread.start()
    own = Group(place, store, 0, place.host, devices[0], buffer)
    for thread in joining:
        thread.join()
    return own, ends


BOTH = pytest.mark.parametrize("backend", ["gloo", "shared"])


@pytest.fixture(scope="module", params=["gloo", "shared"])
def group(request):
    """A trainer and two processes."""
    own, ends = members(2, backend=request.param)
    yield own, ends
    for each in (own, *ends):
        each.close()


def received(end, number, results):
    """A thread that receives a transfer; results gets (tensors, names of changed ones), or the error."""

    def work():
        changed = []
        try:
            results.append((list(end.receive(number, changed)), changed))
        except (BrokeOff, BadStream) as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


NUMBERS = iter(range(1, 10**6))


@settings(max_examples=30, deadline=None)
@given(st.lists(tensors(), max_size=5))
def test_every_process_gets_the_tensors_to_the_bit(group, named):
    """Any dtype, shape, name and layout; NaN with its bits."""
    own, ends = group
    number, results = next(NUMBERS), []
    threads = [received(end, number, results) for end in ends]
    own.send(iter(named))
    for thread in threads:
        thread.join(20)
    assert len(results) == 2
    for arrived, changed in results:
        assert [name for name, _ in arrived] == [name for name, _ in named] and changed == []
        for (_, sent), (_, got) in zip(named, arrived, strict=True):
            assert got.dtype == sent.dtype and got.shape == sent.shape and int(checksum(got)) == int(checksum(sent))


def test_a_changed_bit_is_named(group, monkeypatch):
    """The checksum in a header is another than that of what follows; the tensor beside it (the control) is fine."""
    own, ends = group
    number, results = next(NUMBERS), []
    threads = [received(end, number, results) for end in ends]
    told = broadcast.header_of
    monkeypatch.setattr(
        broadcast, "header_of", lambda name, *rest: told(name, *rest) | ({"checksum": 1} if name == "b" else {})
    )
    own.send(iter([("a", torch.randn(3)), ("b", torch.randn(3))]))
    for thread in threads:
        thread.join(20)
    assert [changed for _, changed in results] == [["b"], ["b"]]


@BOTH
def test_a_member_that_leaves_ends_the_others_wait(backend):
    """The trainer after one tensor; a process in the middle."""
    own, (end,) = members(1, backend=backend)
    results = []
    thread = received(end, 1, results)

    def one_and_away():
        yield "a", torch.randn(3)
        own.close()
        yield "b", torch.randn(3)

    with pytest.raises(BrokeOff):
        own.send(one_and_away())
    thread.join(20)
    assert isinstance(results[0], BrokeOff)
    own, (end,) = members(1, backend=backend)
    thread = threading.Thread(target=lambda: (next(end.receive(1, [])), end.close()))
    thread.start()
    with pytest.raises(BrokeOff):
        own.send(iter([(str(n), torch.randn(100_000)) for n in range(100)]))
    thread.join(20)


def test_tensors_larger_than_the_shared_memory(group):
    """A tensor of two parts and a half, and one of exactly one part."""
    own, ends = group
    number, results = next(NUMBERS), []
    named = [("a", torch.randn(BUFFER_BYTES * 5 // 8)), ("b", torch.randn(BUFFER_BYTES // 4)), ("c", torch.ones(3))]
    threads = [received(end, number, results) for end in ends]
    own.send(iter(named))
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    for arrived, changed in results:
        assert changed == []
        assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(arrived, named, strict=True))


def test_a_silent_reader_of_shared_memory_is_not_waited_for_forever():
    """It has read one part; another one fails, which the sender is told."""
    for timeout_s, gave_up, words in ((0.5, lambda: False, "no other member"), (60.0, lambda: True, "has failed")):
        own, _ = members(1, timeout_s, backend="shared")
        own.gave_up = gave_up
        with pytest.raises(BrokeOff, match=words):
            own.send(iter([("a", torch.randn(3))]))


READS_ON_A_GPU = """
import json, sys, torch
from grpo.rollout.vllm.broadcast import Group, Place
end = Group.join(Place(**json.loads(sys.argv[1])), torch.device("cuda", 0))
changed = []
for name, tensor in end.receive(1, changed):
    assert tensor.is_cuda
    print(name, tuple(tensor.shape), float(tensor.double().sum()), changed, flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC: one GPU")
def test_memory_of_a_gpu_between_two_processes():
    """CUDA IPC, one GPU: a tensor of several parts, and a small one in bf16. Not run so far."""
    listening = socket.create_server(("127.0.0.1", 0))
    buffer = SharedBuffer.create(torch.device("cuda", 0))
    place = Place("a group", "127.0.0.1", listening.getsockname()[1], 2, "shared", 60.0, buffer.handle)
    store = dist.TCPStore(
        place.host,
        place.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=listening.detach(),
    )
    command = [sys.executable, "-c", READS_ON_A_GPU, json.dumps(asdict(place))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as reader:
        own = Group(place, store, 0, place.host, torch.device("cuda", 0), buffer)
        named = [
            ("a", torch.randn(BUFFER_BYTES // 2, device="cuda")),
            ("b", torch.ones(3, 5, device="cuda").bfloat16()),
        ]
        own.send(iter(named))
        lines = reader.communicate(timeout=60)[0].splitlines()
    assert reader.returncode == 0
    assert lines == [f"{name} {tuple(sent.shape)} {float(sent.double().sum())} []" for name, sent in named]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank: two GPUs")
def test_nccl_between_two_gpus():
    """What arrives, and a trainer that leaves in the middle. Not run so far."""
    devices = [torch.device("cuda", n) for n in range(2)]
    own, (end,) = members(1, backend="nccl", devices=devices)
    named, results = [("a", torch.randn(1000, device=devices[0])), ("b", torch.randn(3, 5).bfloat16())], []
    thread = received(end, 1, results)
    own.send(iter(named))
    thread.join(60)
    ((arrived, changed),) = results
    assert changed == [] and all(torch.equal(got.cpu(), sent.cpu()) for (_, got), (_, sent) in zip(arrived, named))
    thread = received(end, 2, results)
    own.close()
    thread.join(60)
    assert isinstance(results[1], BrokeOff)


# --- the engine


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
