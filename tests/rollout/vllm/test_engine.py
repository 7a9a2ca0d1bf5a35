"""The engine against stand-ins of its servers: equal completions, and one line for each thing that goes wrong.

A fault test says what the line must hold, so that another failure cannot pass for the one that was meant.
"""

import json
import threading
import time

import pytest
import torch

from grpo.rollout.sampling import Sampling
from grpo.rollout.vllm import client
from grpo.rollout.vllm.asked import MAX_BREAKS
from grpo.rollout.vllm.wire import NOT_FINITE, PROTOCOL, index_of, packed, unpacked
from tests.rollout.vllm.asking import Trainer, assert_equal
from tests.support.rollout_server import Died

SAMPLINGS = {
    "plain": {},
    "warm": {"temperature": 1.3},
    "top_p": {"top_p": 0.9, "max_support": 20},
    "top_k, min_p": {"top_k": 6, "min_p": 0.02},
    "stop": {"stop": ["a", "7"]},
    "padded": {"num_tokens": 200},
}


@pytest.mark.parametrize("how", SAMPLINGS.values(), ids=SAMPLINGS)
def test_completions_are_the_native_engines(tiny_folder, stand_in, how):
    """On two servers, with weights that differ from the servers' own; without those (the control) tokens differ."""
    trainer = Trainer(tiny_folder, [stand_in(), stand_in()], **how)
    control = trainer.native()
    trainer.update()
    trainer.send()
    heard = []
    ours = trainer.sample(on_finished=heard.extend)
    assert not trainer.problems
    assert_equal(ours, trainer.native())
    if not how:  # an evaluation is greedy
        greedy = Sampling(temperature=0.0)
        assert_equal(trainer.sample(greedy), trainer.native(greedy))
    assert sorted(one.row for one in heard) == list(range(9))
    assert [one.token_ids.tolist() for one in control] != [one.token_ids.tolist() for one in ours]


def test_every_server_gets_whole_groups_and_equal_weights(tiny_folder, stand_in):
    servers = [stand_in(), stand_in()]
    trainer = Trainer(tiny_folder, servers)
    for _ in range(2):
        trainer.update()
        trainer.send()
        trainer.send()  # the same version again: nothing to send
        trainer.sample()
    assert [len(server.loads) for server in servers] == [2, 2]
    # slots 10 and 12 (6 rows) and slot 11 (3 rows); probes before each
    assert [number for _, number in servers[0].asked] == [3, 6, 3, 6]
    assert [number for _, number in servers[1].asked] == [3, 3, 3, 3]
    for server in servers:
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(server.loads[-1][name], parameter)


# --- faults


def at_line(number, fault):
    """Lines of an answer, with a fault before the line of that number, the first time."""
    left = [number]

    def change(lines, given):
        for line in lines:
            if left and b"key" in line:
                left[0] -= 1
                if left[0] < 0:
                    left.clear()
                    yield from fault(line)
            yield line

    return change


def died(line):
    raise Died


def silent(line):
    time.sleep(3)
    yield line


def always_silent(lines, given):
    time.sleep(3)
    yield from lines


def slow_but_alive(lines, given):
    """More time than rollout_timeout_s + GRACE_S in all, but never without a sign."""
    for number, line in enumerate(lines):
        time.sleep(0.2)
        yield json.dumps({"progress": number}).encode() + b"\n"
        yield line


def edited(**fields):
    """Every completion with other fields."""

    def change(lines, given):
        for line in lines:
            yield json.dumps(json.loads(line) | fields).encode() + b"\n" if b"key" in line else line

    return change


def instead(*texts):
    """Other lines."""
    return lambda lines, given: iter([text + b"\n" for text in texts])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[max(index_of(file), key=lambda frame: frame.length).start + 1] ^= 1
    file.write_bytes(data)


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def one_layer_scaled(tensors):
    """What a server that keeps a packed copy of a weight, or has another rope, amounts to."""
    name = next(name for name in tensors if "o_proj" in name)
    return tensors | {name: tensors[name] * 3}


def nothing_loaded(tensors):
    return {}


OUT_OF_MEMORY = (500, b'{"error": "RuntimeError: out of memory: you tried to allocate 8 GiB"}')
AT_WEIGHTS = {  # what goes wrong -> (hook, its function, words of the line, transfers tried)
    "half a transfer": ("change_stored", cut, "weights: it ", 3),
    "a bit changed on the way": ("change_stored", flip_a_bit, "arrived changed", 3),
    "a layer loaded wrong": ("change_weights", one_layer_scaled, "on fixed texts", 1),
    "weights not used": ("change_weights", nothing_loaded, "on fixed texts", 1),
    "no memory": ("before", lambda path: OUT_OF_MEMORY if path == "/weights" else None, "out of memory", 3),
    "nonsense": ("before", lambda path: (200, b'{"version": 3}') if path == "/weights" else None, "malformed", 1),
    "no JSON": ("before", lambda path: (200, b"<html>") if path == "/weights" else None, "no rollout server", 1),
    "another token": ("before", lambda path: (401, b"{}") if path == "/weights" else None, "the token", 1),
    "no route": ("before", lambda path: (404, b"<html>") if path == "/weights" else None, "no rollout server", 1),
    "another protocol": ("change_facts", lambda facts: facts | {"protocol": 0}, "speaks protocol 0", 0),
    "facts without a version": ("change_facts", lambda facts: {"protocol": PROTOCOL}, "malformed", 0),
    "facts that are a list": ("change_facts", lambda facts: [facts], "no rollout server", 0),
    "deep nonsense": ("before", lambda path: (200, b"[" * 100000), "no rollout server", 0),
}


@pytest.mark.parametrize("case", AT_WEIGHTS.values(), ids=AT_WEIGHTS)
def test_faults_while_weights_are_sent(tiny_folder, stand_in, case):
    """One line with the address, and no completion is taken afterwards."""
    hook, function, words, transfers = case
    server = stand_in()
    trainer = Trainer(tiny_folder, [server])
    trainer.update()
    tried = []

    def counted(path):
        tried.append(path)
        return function(path) if hook == "before" else None

    setattr(server, hook, function)
    server.before = counted
    trainer.send()
    (line,) = trainer.problems
    assert server.url in line and words in line and "\n" not in line
    assert tried.count("/weights") == transfers
    server.before = lambda path: None
    assert trainer.sample() == []


def test_a_transfer_that_broke_off_is_repeated(tiny_folder, stand_in):
    """Once cut, once with a bit changed: the third is whole."""
    server = stand_in()
    trainer = Trainer(tiny_folder, [server])
    trainer.update()
    faults = [cut, flip_a_bit]
    server.change_stored = lambda file: faults.pop(0)(file) if faults else None
    trainer.send()
    assert not trainer.problems and not faults
    assert_equal(trainer.sample(), trainer.native())


AT_GENERATE = {  # what goes wrong -> (lines of the answer, words of the line)
    "silent": (always_silent, "no new token for 1 s"),
    "no memory": (instead(b'{"error": "RuntimeError: out of memory"}'), "out of memory"),
    "nothing but an end": (instead(b'{"done": true}'), "ended without 9 completions"),
    "rows that are aborted": (edited(finish="abort"), "ended without 9 completions"),
    "no JSON": (instead(b"<html>"), "malformed"),
    "a list": (instead(b"[1]"), "malformed"),
    "an unknown line": (instead(b'{"x": 1}'), "malformed"),
    "no tokens": (edited(tokens=""), "has 0 tokens"),
    "no base64": (edited(tokens="?"), "malformed"),
    "half a number": (edited(tokens="AAA="), "malformed"),
    "tokens that are a number": (edited(tokens=7), "malformed"),
    "fewer log-probs": (edited(logprobs=packed([-1.0], "<f4")), "malformed"),
    "ids beyond the vocabulary": (edited(tokens=packed([10**6] * 12, "<i4"), logprobs="AAAA" * 16), "malformed"),
    "negative ids": (edited(tokens=packed([-1], "<i4"), logprobs="AAAAAA=="), "malformed"),
    "too many tokens": (edited(tokens=packed([5] * 99, "<i4"), logprobs=packed([-1] * 99, "<f4")), "99 tokens"),
    "other weights": (edited(version="somebody-1"), "of weights somebody-1"),
    "a row that was not asked": (edited(key=77), "malformed"),
    "a row twice": (edited(key=0), "malformed"),
}


@pytest.mark.parametrize("case", AT_GENERATE.values(), ids=AT_GENERATE)
def test_faults_of_a_rollout(tiny_folder, stand_in, case, monkeypatch):
    """One line with the address; whatever had been finished before is whole."""
    monkeypatch.setattr("grpo.rollout.vllm.asked.GRACE_S", 0.2)
    change, words = case
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], rollout_timeout_s=1.0)
    trainer.send()
    server.change_lines = change
    finished = trainer.sample()
    (line,) = trainer.problems
    assert server.url in line and words in line and "\n" not in line
    whole = {one.row: one.token_ids.tolist() for one in trainer.native()}
    assert all(one.token_ids.tolist() == whole[one.row] for one in finished)


SUPPORTS = {  # kept ids of a token that is 9: their numbers, they themselves, and words
    "beyond the vocabulary": ([1], [10**6], "outside of their support"),
    "none": ([0], [], "outside of their support"),
    "others": ([2], [5, 6], "outside of their support"),
    "negative": ([2], [-7, 9], "outside of their support"),
    "more than the width": ([3], [9, 5, 6], "at most 2 each"),
    "more than announced": ([1], [9, 5], "at most 2 each"),
    "a negative number": ([-1], [9], "at most 2 each"),
    "of another token": ([1, 1], [9, 9], "row"),
}


@pytest.mark.parametrize("case", SUPPORTS.values(), ids=SUPPORTS)
def test_a_support_must_hold_its_token(tiny_folder, stand_in, case):
    kept, ids, words = case
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], top_k=2)
    trainer.send()
    one = dict(tokens=packed([9], "<i4"), logprobs=packed([-1], "<f4"))
    server.change_lines = edited(**one, kept=packed(kept, "<i4"), support=packed(ids, "<i4"))
    trainer.sample()
    assert "malformed" in trainer.problems[0] and words in trainer.problems[0]


WRONG_COPIES = {  # of eight copies the third: what its second log-prob becomes; max_sampler_gap; words
    "all are right": (lambda logprob: logprob, None, None),
    "far off": (lambda logprob: logprob - 5.0, None, "token 2, copy 3: -"),
    "less than the limit on average over all": (lambda logprob: logprob - 1.5, 0.15, "token 2, copy 3: -"),
    "not finite": (lambda logprob: NOT_FINITE, 0.15, "a logit that is not finite in text 1, copy 3"),
}


@pytest.mark.parametrize("case", WRONG_COPIES.values(), ids=WRONG_COPIES)
def test_every_copy_of_a_server_is_probed(tiny_folder, stand_in, case):
    change, limit, words = case
    server = stand_in()
    server.change_facts = lambda facts: facts | {"copies": 8}

    def of_a_copy(lines, given):
        for text in lines:
            line = json.loads(text)
            if given["each_copy"] and line.get("key", 0) % 8 == 2:
                logprobs = unpacked(line["logprobs"], "<f4").copy()
                logprobs[1] = change(logprobs[1])
                text = json.dumps(line | {"logprobs": packed(logprobs, "<f4")}).encode() + b"\n"
            yield text

    server.change_lines = of_a_copy
    trainer = Trainer(tiny_folder, [server], max_sampler_gap=limit)
    trainer.send()
    assert [number for _, number in server.asked] == [24]
    assert (words is None and trainer.problems == []) or (len(trainer.problems) == 1 and words in trainer.problems[0])


def test_a_connection_that_always_breaks_is_given_up(tiny_folder, stand_in, monkeypatch):
    """The server answers and draws tokens each time, but no completion ever arrives."""
    monkeypatch.setattr(client, "RETRY_S", 0.01)
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], rollout_timeout_s=60.0)
    trainer.send()
    tries = []

    def breaks(lines, given):
        tries.append(1)
        yield json.dumps({"progress": len(tries)}).encode() + b"\n"
        raise Died

    server.change_lines = breaks
    assert trainer.sample() == []
    (line,) = trainer.problems
    assert server.url in line and "broke off" in line and len(tries) == MAX_BREAKS


def test_a_rollout_that_broke_off_goes_on_with_what_is_missing(tiny_folder, stand_in):
    """Equal tokens; asked again for the missing rows alone."""
    server = stand_in()
    trainer = Trainer(tiny_folder, [server])
    trainer.send()
    server.change_lines = at_line(4, died)
    assert_equal(trainer.sample(), trainer.native())
    assert not trainer.problems
    assert [number for _, number in server.asked] == [3, 9, 5]


def restarting(server, kept, after_s):
    """Lines, and after the fourth the server is killed and restarted."""

    def fault(line):
        def again():
            server.die()
            time.sleep(after_s)
            server.revive(kept)

        threading.Thread(target=again).start()
        time.sleep(0.2)
        raise Died
        yield

    return at_line(4, fault)


@pytest.mark.parametrize("kept", [True, False], ids=["weights kept", "weights lost"])
def test_a_server_that_is_restarted(tiny_folder, stand_in, kept):
    """It goes on when the same weights are held again; else it ends with a line, and not with other tokens."""
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], rollout_timeout_s=8.0)
    trainer.send()
    server.change_lines = restarting(server, kept, 0.5)
    finished = trainer.sample()
    if kept:
        assert not trainer.problems
        assert_equal(finished, trainer.native())
    else:
        assert len(finished) == 4
        assert server.url in trainer.problems[0] and "lost the weights" in trainer.problems[0]


@pytest.mark.parametrize("of_two", [False, True], ids=["the only one", "one of two"])
def test_a_server_that_dies_for_good(tiny_folder, stand_in, of_two):
    servers = [stand_in() for _ in range(1 + of_two)]
    trainer = Trainer(tiny_folder, servers, rollout_timeout_s=1.0)
    trainer.send()
    servers[0].change_lines = restarting(servers[0], True, 10**6)
    began = time.monotonic()
    trainer.sample()
    assert servers[0].url in trainer.problems[0] and "nothing listens there" in trainer.problems[0]
    assert time.monotonic() - began < 10


def test_slow_is_not_silent(tiny_folder, stand_in, monkeypatch):
    """Tokens that come slowly, over a multiple of rollout_timeout_s, are waited for."""
    monkeypatch.setattr("grpo.rollout.vllm.asked.GRACE_S", 0.0)
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], rollout_timeout_s=1.0)
    trainer.send()
    server.change_lines = slow_but_alive
    assert_equal(trainer.sample(), trainer.native())
    assert not trainer.problems


def test_a_server_with_other_weights_is_never_sampled(tiny_folder, stand_in):
    """Another trainer has sent its own between transfer and rollout."""
    server = stand_in()
    ours, other = Trainer(tiny_folder, [server]), Trainer(tiny_folder, [server])
    ours.send()
    other.update()
    other.send()
    assert ours.sample() == []
    assert "lost the weights" in ours.problems[0]


def test_a_rollout_that_is_interrupted_ends_at_once(tiny_folder, stand_in):
    server = stand_in()
    trainer = Trainer(tiny_folder, [server])
    trainer.send()
    server.change_lines = at_line(2, silent)
    began, finished = time.monotonic(), []
    trainer.sample(pulse=lambda: len(finished) == 2, on_finished=finished.extend)
    assert time.monotonic() - began < 2 and len(finished) == 2 and not trainer.problems
