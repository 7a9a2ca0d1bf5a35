"""The number of device syncs of an update does not depend on its number of micro-batches."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.runtime.distributed import World
from grpo.training import losses
from grpo.training.exchange import deliver
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.skipped_updates import SkippedUpdate
from tests.support.rank_jobs import config, injected, make_policy, table_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
GRPO = str(Path(losses.__file__).parents[1])
OTHERS = {  # may read more often the more micro-batches there are
    "fused_head.py",  # reads whether logits are clamped, on CPU only, where a read is free
    "transformers",  # reads whether texts share a padded row
}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class HostReads(TorchDispatchMode):
    """Counts operators that would be a device sync, by the file of this project that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: Counter[str] = Counter()

    def read(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(GRPO):
            if "/transformers/" in frame.f_code.co_filename:
                self.by_file["transformers"] += 1
                return
            frame = frame.f_back
        self.by_file["elsewhere" if frame is None else Path(frame.f_code.co_filename).name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        masks = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in READS or masks:
            self.read()
        return func(*args, **(kwargs or {}))


def minibatch_of(policy, cfg):
    prompts, completions, advantages = injected(cfg, 0)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, 1)
    table = table_of(cfg, lengths, np.zeros(len(completions)))
    [minibatch] = policy.annotate(deliver(ALONE, cfg, plan, prompts, completions, table, advantages, 0))
    assert len(minibatch) >= 3
    return minibatch


def reads_of(policy, minibatch, monkeypatch):
    """Reads of one update, by file, with those of whole tensors, which call no operator on CPU."""
    watched = HostReads()
    with monkeypatch.context() as patched:
        for name in ("tolist", "numpy", "cpu"):
            plain = getattr(torch.Tensor, name)
            patched.setattr(torch.Tensor, name, lambda *args, plain=plain, **how: (watched.read(), plain(*args))[1])
        with watched:
            policy.update(minibatch, Tally(), 10, True)
    return watched.by_file


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"deterministic": True}], ids=["plain", "kl", "deterministic"])
def test_the_number_of_micro_batches_does_not_change_the_number_of_device_syncs(settings, monkeypatch):
    cfg = config(**settings)
    policy = make_policy(cfg, ALONE)
    minibatch = minibatch_of(policy, cfg)
    one, three = (reads_of(policy, minibatch[:number], monkeypatch) for number in (1, 3))
    assert 0 < sum(one[name] for name in OTHERS) < sum(three[name] for name in OTHERS), "the mode counts nothing"
    ours = [{name: count for name, count in reads.items() if name not in OTHERS} for reads in (one, three)]
    assert ours[0] == ours[1]
    assert ours[0]["metrics.py"] == 1 and ours[0]["ddp.py"] <= 2, ours[0]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_loss_makes_every_later_gradient_nan_and_enters_no_mean(poison, at):
    """Its own gradient too, which would be finite. SkippedUpdate has all losses, the means are those of the others."""
    cfg = config()
    policy = make_policy(cfg, ALONE)
    minibatch = minibatch_of(policy, cfg)[:3]
    true_loss, true_backward = policy.loss, policy.backend.backward
    made, given, finite = [], [], []

    def loss(micro, tally, unchanged):
        value = true_loss(micro, tally, unchanged)
        if len(made) == at:
            value = value + poison
        tally.micro_batch(value.detach(), {}, {}, micro.trained)
        made.append(float(value.detach()))
        return value

    def backward(value, last):
        true_backward(value, last)
        given.append(bool(torch.isfinite(value)))
        finite.append(all(bool(torch.isfinite(p.grad).all()) for p in policy.model.parameters() if p.grad is not None))

    policy.loss, policy.backend.backward = loss, backward
    tally = Tally()
    with pytest.raises(SkippedUpdate) as caught:
        policy.update(minibatch, tally, 10, True)
    np.testing.assert_array_equal(caught.value.losses, made)
    assert finite == given == [i < at for i in range(3)]
    assert all(np.isfinite(value) for value in (*tally.sums.values(), *tally.maxima.values()))


def test_a_rewound_tally_forgets_what_was_not_read_yet():
    tally, mask = Tally(), torch.ones(1, 2, dtype=torch.bool)
    values = {"kl": torch.full((1, 2), 0.5)}
    tally.micro_batch(torch.tensor(1.0), values, {"ratio_gap": torch.tensor(2.0)}, mask)
    mark = tally.mark()
    tally.micro_batch(torch.tensor(4.0), values, {"ratio_gap": torch.tensor(8.0)}, mask)
    tally.rewind(mark)
    tally.micro_batch(torch.tensor(float("nan")), values, {"ratio_gap": torch.tensor(float("nan"))}, mask)
    reduced = tally.reduce(ALONE).metrics
    assert (reduced["loss"], reduced["kl"], reduced["ratio_gap"]) == (1.0, 0.5, 2.0) and tally.counts["kl"] == 4
