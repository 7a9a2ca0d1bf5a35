"""Saving in the background: a copy of that moment, one at a time, and a failure costs a warning."""

import shutil
import threading
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.background import Saver
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from grpo.runtime.heartbeat import Heartbeat
from tests.checkpoints.test_checkpoint import ALONE, trained
from tests.support.tiny import tiny_tokenizer


@pytest.fixture
def run(tmp_path):
    """A saver and a policy after one step."""
    cfg = Config(model="m", data="d", rewards={"r": 1.0})
    policy = trained(cfg)
    policy.counters.step = 1
    lines: list[str] = []
    saver = Saver(cfg, tmp_path, Heartbeat(tmp_path, ALONE), lines.append)
    return saver, policy, lines, tmp_path


def save(saver, policy, step):
    policy.counters.step = step
    saver.save(policy, tiny_tokenizer(), Recipe(), {})


def test_training_goes_on_while_the_moment_of_the_save_is_written(run, monkeypatch):
    """The write waits until weights and moments have changed: the disk gets the values of before."""
    saver, policy, lines, folder = run
    go_on = threading.Event()
    plain = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: go_on.wait(60) and plain(*args))
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    moments = {f"{p.name}|{p.moment}|{p.start}": p.values.clone() for p in policy.backend.moments()}
    save(saver, policy, 1)
    assert lines == [] and list(folder.glob("checkpoint_*")) == [], "nothing is committed yet"
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
        for piece in policy.backend.moments():
            policy.backend.optimizer.state[dict(policy.model.named_parameters())[piece.name]][piece.moment].zero_()
    policy.counters.updates = 77
    go_on.set()
    saver.wait()
    assert lines == [f"saved {folder}/checkpoint_1"] and checkpoint.verify(folder / "checkpoint_1") is None
    written = load_file(folder / "checkpoint_1" / "model.safetensors")
    assert written and all(torch.equal(tensor, before[name]) for name, tensor in written.items())
    [share] = (folder / "checkpoint_1" / "trainer").glob("optimizer-*")
    assert {name: tensor.tolist() for name, tensor in load_file(share).items()} == {
        name: tensor.tolist() for name, tensor in moments.items()
    }
    assert '"updates": 2' in (folder / "checkpoint_1" / "trainer" / "state.json").read_text()
    assert set(saver.take_seconds()) == {"save/snapshot_s", "save/write_s", "save/wait_s"}


def test_one_save_is_in_flight_at_a_time(run, monkeypatch):
    saver, policy, lines, folder = run
    at_once, most = [0], [0]
    plain = checkpoint.write_snapshot

    def write(*args):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            return plain(*args)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(checkpoint, "write_snapshot", write)
    for step in (1, 2, 3):
        save(saver, policy, step)
    saver.finish()
    assert most == [1] and len(lines) == 3 and len(list(folder.glob("checkpoint_*"))) == 3


def test_a_failed_save_costs_a_warning_and_the_next_one_works(run, monkeypatch, capsys):
    """The disk is full for one save: earlier checkpoints stay valid, no files are left, a warning is printed.

    The run fails only when its last save fails.
    """
    saver, policy, lines, folder = run
    save(saver, policy, 1)
    saver.wait()
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
        save(saver, policy, 2)
        saver.wait()
        warning = capsys.readouterr().err
        assert "checkpoint_2 could not be written" in warning and "0 MB free" in warning and "goes on" in warning
        assert [path.name for path in folder.glob("*check*")] == ["checkpoint_1"]
        with pytest.raises(UserError, match=r"checkpoint_2 could not be written: .*MB needed.*run the same command"):
            saver.finish()
    save(saver, policy, 3)
    saver.finish()
    assert [checkpoint.verify(folder / f"checkpoint_{n}") for n in (1, 3)] == [None, None] and len(lines) == 2


def test_what_the_thread_raises_is_not_lost(run, monkeypatch):
    saver, policy, _, _ = run
    monkeypatch.setattr(checkpoint, "write_snapshot", lambda *args: 1 / 0)
    save(saver, policy, 1)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
