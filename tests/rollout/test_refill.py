"""Rows join a batch as others leave it: samples do not change, the cache keeps to its budget, the batch stays full."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.forward.logprobs import Head
from grpo.rollout import Request, prefill, shared_cache
from grpo.rollout.admission import Admission
from grpo.rollout.caches import PlainCache
from grpo.rollout.engine import NativeEngine
from grpo.rollout.row_buffer import RowBuffer
from grpo.rollout.sampling import Sampling
from grpo.rollout.shared_cache import SharedCache
from tests.support.tiny import tiny_model

NEW = 40
PREFIX = tuple(range(20, 40))
LENGTHS = (3, 9, 5, 14, 4, 7)


def requests_of(prefix=(), group=3):
    """Six prompts of different lengths, and a group of completions of each."""
    prompts = [(*prefix, *(5 + (7 * p + i) % 50 for i in range(n))) for p, n in enumerate(LENGTHS)]
    return [Request(p * group + g, p, g, ids) for p, ids in enumerate(prompts) for g in range(group)]


def engine_of(architecture="qwen3", max_tokens=None):
    """Stops often, so that lengths spread."""
    return NativeEngine(tiny_model(architecture, spread=1.5), range(0, 12), NEW, 3, max_tokens=max_tokens)


def watch_decodes(monkeypatch):
    """Rows of each decode step from now on."""
    rows = []
    for kind in (SharedCache, PlainCache):
        plain = kind.decode
        monkeypatch.setattr(
            kind, "decode", lambda cache, ids, then, plain=plain: (rows.append(len(ids)), plain(cache, ids, then))[1]
        )
    return rows


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("reading", ["by row", "by prompt"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt2", "gemma2"])
def test_a_budget_of_tokens_changes_no_sample(architecture, reading, prefix, monkeypatch):
    """gemma3 has windows, gpt2 learned positions; rows of gemma2 cannot join a batch and wait for the next."""
    monkeypatch.setattr(shared_cache, "SHORT_PROMPT", 10**6 if reading == "by row" else 0)
    monkeypatch.setattr(shared_cache, "FEW_ROWS", 0 if reading == "by prompt" else 4)
    requests = requests_of(prefix)
    whole = engine_of(architecture).generate(requests, Sampling())
    rows = watch_decodes(monkeypatch)
    given = []
    budget = 3 * (len(prefix) + max(LENGTHS) + NEW) * 2
    parts = engine_of(architecture, budget).generate(requests, Sampling(), on_finished=given.extend)
    assert [c.row for c in parts] == list(range(len(requests)))
    for a, b in zip(whole, parts, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=1e-4)
    assert max(rows) < len(requests), "all rows decoded at once: the budget had no effect"
    assert len({len(c.token_ids) for c in whole}) > 5 and {c.finish for c in whole} == {"stop", "length"}
    by_sample = {id(c): c.row for c in parts}
    assert sorted(c.row for c in given) == sorted(by_sample.values()) and {id(c) for c in given} == set(by_sample)


def test_rows_that_end_make_room_at_once(monkeypatch):
    requests = requests_of()
    rows = watch_decodes(monkeypatch)
    engine = engine_of(max_tokens=6 * (NEW + 14))
    engine.generate(requests, Sampling())
    refilled = len(rows)
    assert any(later > earlier for earlier, later in zip(rows, rows[1:], strict=False)), "no row joined"
    rows.clear()
    monkeypatch.setattr(SharedCache, "joins", False)  # batch after batch
    engine.generate(requests, Sampling())
    assert refilled < 0.8 * len(rows)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    group=st.integers(1, 5),
    shares_prompts=st.booleans(),
    max_tokens=st.none() | st.integers(1, 300),
    max_rows=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_admission_keeps_to_its_budget_and_admits_every_row(lengths, group, shares_prompts, max_tokens, max_rows, seed):
    rows = [Request(p * group + g, p, g, (p,) * n) for p, n in enumerate(lengths) for g in range(group)]
    queue = Admission(rows, 10, max_tokens, max_rows, shares_prompts)
    rng = np.random.default_rng(seed)
    active, seen = [], []
    while queue.waiting or active:
        admitted = queue.admit(active)
        assert admitted or active, "no row is active and none is admitted"
        active += admitted
        seen += admitted
        prompts = [row.prompt_ids for row in active]
        tokens = 10 * len(active) + sum(map(len, set(prompts) if shares_prompts else prompts))
        assert len(active) == 1 or (len(active) <= max_rows and tokens <= (max_tokens or tokens))
        active = [row for row in active if rng.random() < 0.5]
    assert seen == rows


def test_a_stop_leaves_waiting_requests_out(monkeypatch):
    requests = requests_of()
    engine = engine_of(max_tokens=4 * (NEW + 14))
    whole = {c.row: c for c in engine.generate(requests, Sampling())}
    calls, given = [], []
    cut = engine.generate(requests, Sampling(), lambda: len(calls) > 12 or calls.append(0), on_finished=given.extend)
    assert 4 <= len(cut) < len(requests) and {c.row for c in given} == {c.row for c in cut}
    for completion in cut:
        assert completion.token_ids.tolist() == whole[completion.row].token_ids[: len(completion.token_ids)].tolist()
    assert any(len(c.token_ids) < len(whole[c.row].token_ids) for c in cut)


def test_what_is_finished_when_memory_runs_out_is_not_sampled_again():
    requests = requests_of()
    engine = engine_of()
    whole = engine.generate(requests, Sampling())
    words, calls = engine.model.get_input_embeddings(), []
    plain = words.forward

    def forward(input_ids):
        calls.append(0)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(input_ids)

    words.forward = forward
    given = []
    again = engine.generate(requests, Sampling(), on_finished=given.extend)
    words.forward = plain
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in whole]
    assert sorted(c.row for c in given) == list(range(len(requests))) and engine.fitting.halvings == 1
    early = [c.row for c in whole if len(c.token_ids) < 6]
    assert early and {c.row for c in given[: len(early)]} == set(early), "finished before the failure"


def test_reading_less_often_which_rows_are_finished_changes_nothing():
    requests = requests_of()
    engine = engine_of(max_tokens=6 * (NEW + 14))
    whole = engine.generate(requests, Sampling())
    engine.read_done_steps = 7
    seldom = engine.generate(requests, Sampling())
    for a, b in zip(whole, seldom, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_long_prompt_is_computed_by_pieces(architecture, monkeypatch):
    model = tiny_model(architecture)
    requests = [Request(0, 0, 0, tuple(range(5, 48))), Request(1, 1, 0, (5, 6, 7, 8))]
    plain = PlainCache(model, 4)
    with torch.no_grad():
        expected = plain.join(requests, True)
        monkeypatch.setattr(prefill, "PREFILL_TOKENS", 16)
        monkeypatch.setattr(prefill, "PIECE", 6)
        calls = []
        head = Head(model)
        handle = head.body().register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        cache = SharedCache(head, requests, 4)
        torch.testing.assert_close(cache.join(requests, True), expected, rtol=1e-4, atol=1e-4)
        handle.remove()
        assert calls[:-1] == [6] * 7 + [1] and calls[-1] == 4
        token = torch.tensor([9, 10])
        torch.testing.assert_close(
            cache.decode(token, torch.clone), plain.decode(token, torch.clone), rtol=1e-3, atol=1e-3
        )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), front=st.integers(0, 5))
def test_a_buffer_holds_what_was_put(seed, front):
    """Rows join, leave and write at random; every row's own columns hold what it wrote, in order."""
    rng = np.random.default_rng(seed)
    buffer, rows, started = RowBuffer(max_new_tokens=150), [], []
    spoiled = False
    value = 0.0
    for _ in range(120):
        if not rows or rng.random() < 0.1:
            count = int(rng.integers(1, 4))
            rows += [[] for _ in range(count)]
            buffer.join(count, front, min(started, default=buffer.time))
            started += [buffer.time] * count
        if buffer.full:
            buffer.grow(min(started))
        value += 1.0
        key = torch.arange(len(rows)).float()[:, None, None].expand(-1, 2, 3) / 100 + value
        keys, values = buffer.append(0, key, -key)
        buffer.advance()
        for i, row in enumerate(rows):
            row.append(float(key[i, 0, 0]))
            own = keys[i, 0, keys.shape[2] - len(row) :, 0]
            assert own.tolist() == row and values[i, 1, -1, 2] == -row[-1]
        assert spoiled or bool(torch.isfinite(keys).all()), "unwritten columns must be finite: they are weighed with 0"
        spoiled = rng.random() < 0.1  # a row whose logits are not finite leaves, another takes its place
        if spoiled:
            keys[-1] = values[-1] = torch.nan
            rows, started = rows[:-1], started[:-1]
            buffer.keep(np.arange(len(rows)))
        if rng.random() < 0.2:
            kept = np.flatnonzero(rng.random(len(rows)) < 0.6)
            order = buffer.keep(kept)
            assert sorted(order) == sorted(kept)
            rows, started = [rows[i] for i in order], [started[i] for i in order]
