"""The head in blocks against [B, T, V] held whole: values, gradients, supports, padding, unknown heads."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from grpo.config.settings import Config
from grpo.forward.logprobs import Scorer
from grpo.training.collate import collate
from grpo.types import TrainRow
from tests.support.tiny import tiny_model

VOCAB = 300


def micro_batch(support=False, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for n, (prompt, length) in enumerate([(3, 5), (9, 1), (4, 12)]):
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        kept = None
        if support:
            others = rng.integers(1, VOCAB, (length, 6)).astype(np.int32)
            kept = np.concatenate([ids[:, None], others, np.full((length, 1), -1, np.int32)], 1)
        prompt_ids = tuple(rng.integers(1, VOCAB, prompt).tolist())
        rows.append(TrainRow(n, prompt_ids, ids, np.zeros(length, np.float32), kept, 1.0))
    return collate(rows, dict.fromkeys(range(3), 1.0), torch.device("cpu"))


def naive(model, micro, temperature):
    """Every logit of every position, row by row, without padding."""
    values = torch.zeros(micro.trained.shape)
    for b in range(len(micro.rows)):
        length = int(micro.trained[b].sum())
        last = int(micro.positions[b, length - 1])
        logits = model(micro.input_ids[b : b + 1, : last + 1]).logits[0] / temperature
        for t in range(length):
            row = logits[micro.positions[b, t]]
            if micro.support is not None:
                kept = micro.support[b, t][micro.support[b, t] >= 0]
                values[b, t] = row[micro.target_ids[b, t]] - torch.logsumexp(row[kept], 0)
            else:
                values[b, t] = torch.log_softmax(row, 0)[micro.target_ids[b, t]]
    return values


@pytest.mark.parametrize("support", [False, True], ids=["whole vocabulary", "support"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
def test_blocks_equal_naive_in_value_and_gradient(architecture, support, monkeypatch):
    """Relative gradient difference <= 1e-6; the control, another temperature, is above 1e-2."""
    model = tiny_model(architecture, spread=2.0)
    micro = micro_batch(support)
    monkeypatch.setattr("grpo.forward.logprobs.BLOCK_ELEMENTS_PER_MB", VOCAB * 4)  # 4 tokens a block
    weights = torch.randn(micro.trained.shape, generator=torch.Generator().manual_seed(1)) * micro.trained

    def gradient(values):
        model.zero_grad()
        (values * weights).sum().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    expected = naive(model, micro, 0.8)
    wanted = gradient(expected)
    ours = Scorer(model, Config(temperature=0.8, logits_chunk_mb=1))(micro)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    got = gradient(ours)
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-6
    off = gradient(Scorer(model, Config(temperature=0.9, logits_chunk_mb=1))(micro))
    assert float((off - wanted).norm() / wanted.norm()) > 1e-2


def test_padding_changes_nothing():
    """Garbage in the padding columns leaves values bit-equal: no token looks to its right."""
    model, micro = tiny_model("qwen3"), micro_batch()
    torch.set_grad_enabled(False)
    try:
        clean = Scorer(model, Config())(micro)
        garbage = micro.input_ids.clone()
        for b in range(len(micro.rows)):
            garbage[b, int(micro.positions[b].max()) + 1 :] = 123
        dirty = Scorer(model, Config())(dataclasses.replace(micro, input_ids=garbage))
    finally:
        torch.set_grad_enabled(True)
    assert torch.equal(clean, dirty)


def test_a_head_that_is_not_understood_falls_back_with_a_notice():
    model, micro = tiny_model("qwen3", spread=2.0), micro_batch()
    plain = type(model).forward

    def odd_forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = types.MethodType(odd_forward, model)
    with pytest.warns(UserWarning, match="whole logits"):
        scorer = Scorer(model, Config())
    ours = scorer(micro)
    torch.testing.assert_close(ours, naive(model, micro, 1.0), atol=2e-6, rtol=1e-5)


def test_clamped_logits_score_as_they_sample():
    """Logits of ±1e4: log-probs are those of the clamped distribution, finite, and so is the gradient."""
    model, micro = tiny_model("qwen3"), micro_batch()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    logprobs = Scorer(model, Config())(micro)
    logprobs.sum().backward()
    assert float(logprobs.detach().min()) >= -200 - np.log(VOCAB) - 1e-3
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
