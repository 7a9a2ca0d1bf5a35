"""What the planner adds for entropies, against the tensors [rows, V] that are alive at once while they are computed.

On a GPU a block of logits is worked on as a whole; on a CPU the fused head does so in small parts, which is turned off.
"""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config.settings import Config
from grpo.forward import fused_head
from grpo.forward.fused_head import HeadLogprobs
from grpo.forward.logprobs import Scorer
from grpo.plan.memory import draw_bytes, entropy_copies, estimate, head_bytes
from grpo.plan.model_size import model_size
from grpo.rollout.sampling import Sampling, draw
from tests.support.tiny import tiny_config

ROWS, HIDDEN = 64, 8
SIZE = dataclasses.replace(model_size(tiny_config("qwen2")), vocab=20_000)
LOGITS = torch.randn(ROWS, SIZE.vocab)
BLOCK = LOGITS.nbytes


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def fused(with_entropy):
    """Several blocks, at a temperature, forward and backward; bytes without those of the weight's gradient."""
    hidden = torch.randn(3 * ROWS, HIDDEN, requires_grad=True)
    weight, targets = torch.randn(SIZE.vocab, HIDDEN), torch.randint(0, SIZE.vocab, (3 * ROWS,))
    with LiveBytes() as live:
        logprobs, _, entropy = HeadLogprobs.apply(
            hidden, weight, targets, 1.0, 0.7, 100.0, ROWS, SIZE.vocab, with_entropy
        )
        (logprobs.sum() + entropy.sum() if with_entropy else logprobs.sum()).backward()
    return live.peak / BLOCK


def through_autograd(with_entropy):
    """As `Scorer` does where the head is not one plain matrix."""
    scorer = SimpleNamespace(
        head=SimpleNamespace(num_tokens=SIZE.vocab), cfg=Config(temperature=0.7), counts_hits=False
    )
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    weight, targets = torch.randn(SIZE.vocab, HIDDEN), torch.randint(0, SIZE.vocab, (ROWS,))
    with LiveBytes() as live:
        logprobs, _, entropy = Scorer._pick(scorer, hidden @ weight.t(), targets, None, with_entropy)
        (logprobs.sum() + entropy.sum()).backward()
    return live.peak / BLOCK


@pytest.mark.parametrize(
    ("path", "settings"), [(fused, {}), (through_autograd, {"backend": "deepspeed", "zero_stage": 3})]
)
def test_a_block_with_entropies_needs_as_many_copies_as_planned(path, settings, monkeypatch):
    monkeypatch.setattr(fused_head, "ROWS_IN_CACHE", 10**12)
    for bonus in (0.0, 0.1):
        copies = entropy_copies(Config(entropy_coef=bonus, **settings))
        planned = head_bytes(SIZE, 10**9, 1, False, True, copies) / 2**20
        assert planned == 4 + copies and (copies > 0) == (bonus > 0)
        assert path(bonus > 0) == pytest.approx(planned, abs=0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncated", [{}, {"top_p": 0.9, "max_support": 16}])
def test_a_draw_needs_what_is_planned_where_it_records_entropies(truncated, temperature):
    found = {}
    for records in (False, True):
        sampling = Sampling(temperature, records_entropy=records, **truncated)
        with LiveBytes() as live:
            draw(LOGITS, torch.rand(ROWS, dtype=torch.float64), sampling)
        found[records] = live.peak / BLOCK + 1  # the logits themselves
        planned = draw_bytes(SIZE, ROWS, sampling) / BLOCK
        assert found[records] <= planned + 1
        if not truncated:
            assert found[records] == pytest.approx(planned + 0.6, abs=0.6)
    assert (found[True] > found[False] + 0.9) == (not truncated)


def test_estimates_count_entropies_only_where_a_setting_asks_for_them():
    def entries(**settings):
        found = estimate(Config(device="cpu", **settings), tiny_config("qwen2"), 1)
        return {entry.name: entry.bytes for entry in found.memory}

    plain, bonus, chosen = entries(), entries(entropy_coef=0.1), entries(top_entropy_share=0.2)
    assert bonus["logits block"] == 5 / 4 * plain["logits block"] and chosen["logits block"] == plain["logits block"]
    assert (
        chosen["drawing a token"] == 4 / 3 * plain["drawing a token"]
        and bonus["drawing a token"] == plain["drawing a token"]
    )
    assert chosen["what was drawn"] == 20 / 16 * plain["what was drawn"]
    assert bonus["rows to train on"] > chosen["rows to train on"] > plain["rows to train on"]
