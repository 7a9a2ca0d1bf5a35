"""Replayed decode steps sample what steps launched kernel by kernel sample.

On CPU a tape (tests/support/step_tape.py) takes the place of the graph and fixes what a graph fixes; tests marked `gpu`
use the graph itself.
"""

import gc
import warnings
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.forward import logprobs
from grpo.rollout import Request, row_buffer, sampling, shared_cache
from grpo.rollout import cuda_graph as step_graph
from grpo.rollout.cuda_graph import WARM_STEPS, StepGraph
from grpo.rollout.engine import NativeEngine
from grpo.rollout.row_buffer import COLUMNS_MULTIPLE, RowBuffer
from grpo.rollout.sampling import Sampling
from tests.support.step_tape import Refused, record
from tests.support.tiny import tiny_model

NEW = 44
PREFIX = tuple(range(20, 40))
LENGTHS = (3, 9, 5, 14)


def requests_of(prefix=(), group=3):
    """Prompts of different lengths, and a group of completions of each."""
    prompts = [(*prefix, *(5 + (7 * p + i) % 50 for i in range(n))) for p, n in enumerate(LENGTHS)]
    return [Request(p * group + g, p, g, ids) for p, ids in enumerate(prompts) for g in range(group)]


def engine_of(architecture, graph=None, **settings):
    """A few stop ids, so that rows leave at different times, and some never."""
    engine = NativeEngine(tiny_model(architecture, spread=1.5), range(0, 5), NEW, 3, **settings)
    if graph is not None:
        engine.graph, engine.read_done_steps = graph, 8
    return engine


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The code path that avoids device syncs. Buffers grow early."""
    monkeypatch.setattr(row_buffer, "FIRST_OWN_COLUMNS", 16)
    for module in (logprobs, sampling):
        monkeypatch.setattr(module, "host_reads_are_free", lambda device: False)


def same(expected, found):
    """Completions: tokens, ends and log-probs."""
    assert [c.row for c in expected] == [c.row for c in found]
    for a, b in zip(expected, found, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=1e-4)
        if a.support is not None:
            assert a.support.tolist() == b.support.tolist()
        if a.entropy is not None:
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)


DRAWS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "truncated": Sampling(temperature=0.8, top_p=0.9, top_k=20, max_support=16, records_entropy=True),
    "clamped": Sampling(logit_clamp=2.0, records_entropy=True),
}


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("reading", ["by row", "by prompt"])
@pytest.mark.parametrize(
    "architecture, draws",
    [
        ("qwen3", "plain"),
        ("gemma3", "plain"),
        ("qwen3", "greedy"),
        ("qwen3", "truncated"),
        ("qwen3", "clamped"),
        *(pytest.param("llama", name, marks=pytest.mark.full) for name in DRAWS),
    ],
)
def test_replayed_steps_sample_the_same(architecture, draws, reading, prefix, like_a_gpu, monkeypatch):
    """gemma3 has windows of 8 tokens, and no fast body."""
    monkeypatch.setattr(shared_cache, "SHORT_PROMPT", 10**6 if reading == "by row" else 0)
    monkeypatch.setattr(shared_cache, "FEW_ROWS", 0 if reading == "by prompt" else 4)
    graph = StepGraph(record)
    requests, how = requests_of(prefix), DRAWS[draws]
    expected = engine_of(architecture).generate(requests, how)
    assert draws == "greedy" or {c.finish for c in expected} == {"stop", "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(expected, engine_of(architecture, graph).generate(requests, how))
    assert graph.replays > max(len(c.token_ids) for c in expected) / 2, "few steps were replayed"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("reading", ["by row", "by prompt"])
def test_rows_that_join_are_replayed_too(architecture, reading, like_a_gpu, monkeypatch):
    monkeypatch.setattr(shared_cache, "SHORT_PROMPT", 10**6 if reading == "by row" else 0)
    monkeypatch.setattr(shared_cache, "FEW_ROWS", 0 if reading == "by prompt" else 4)
    requests = requests_of(PREFIX)
    expected = engine_of(architecture).generate(requests, Sampling())
    graph = StepGraph(record)
    budget = 5 * (len(PREFIX) + max(LENGTHS) + NEW)
    same(expected, engine_of(architecture, graph, max_tokens=budget).generate(requests, Sampling()))
    assert graph.captures > 4 and graph.replays > 30


def test_half_precision_is_replayed(like_a_gpu, monkeypatch):
    requests = requests_of(PREFIX)
    graph, never = StepGraph(record), StepGraph(record)
    found = engine_of("qwen3", graph, dtype="bf16").generate(requests, Sampling())
    monkeypatch.setattr(step_graph, "WARM_STEPS", 10**9)
    same(engine_of("qwen3", never, dtype="bf16").generate(requests, Sampling()), found)
    assert graph.replays > NEW / 2 and not never.replays


def test_rows_with_nan_logits_end_alone(like_a_gpu):
    """Weights are read when a step is replayed, not when it is recorded; a row of NaN changes no other row."""
    requests = requests_of()
    clean = engine_of("qwen3").generate(requests, Sampling())
    engine = engine_of("qwen3", StepGraph(record))
    hit = next(c for c in clean if len(c.token_ids) > 20).token_ids[10]
    with torch.no_grad():  # embeddings are tied: this token's logit is NaN too
        engine.model.get_input_embeddings().weight[int(hit)] = torch.nan
    found = engine.generate(requests, Sampling())
    assert {c.finish for c in found} == {"error"}, "every row's logits hold a NaN"


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel_with_a_warning(like_a_gpu):
    requests = requests_of()
    expected = engine_of("qwen3").generate(requests, Sampling())
    engine = engine_of("qwen3", StepGraph(record))
    plain = engine.fast_llama.__class__.__call__

    def asking(body, token_ids, *rest):
        hidden = plain(body, token_ids, *rest)
        return hidden + 0 * float(hidden.sum())

    engine.fast_llama.__class__.__call__ = asking
    try:
        with pytest.warns(UserWarning, match="kernel by kernel.*_local_scalar_dense.*cuda_graphs: false"):
            same(expected, engine.generate(requests, Sampling()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(expected, engine.generate(requests, Sampling()))
    finally:
        engine.fast_llama.__class__.__call__ = plain
    assert not engine.graph.usable and engine.graph.replays == 0


@pytest.mark.parametrize("fault", ["nothing runs", "half runs"])
def test_a_graph_with_other_results_is_not_used(fault, like_a_gpu):
    requests = requests_of()
    expected = engine_of("qwen3").generate(requests, Sampling())

    def broken(step):
        made, replay = record(step)
        if fault == "half runs":
            tape = replay.__self__
            tape.calls = tape.calls[len(tape.calls) // 2 :]
            return made, replay
        return made, lambda: None

    engine = engine_of("qwen3", StepGraph(broken))
    with pytest.warns(UserWarning, match="other numbers"):
        same(expected, engine.generate(requests, Sampling()))
    assert engine.graph.captures == engine.graph.replays == 0


def test_rows_whose_graph_does_not_fit_into_memory_continue_without_one(like_a_gpu):
    requests = requests_of()
    expected = engine_of("qwen3").generate(requests, Sampling())
    tried = []

    def small(step):
        made, replay = record(step)
        tried.append(len(made.token_ids))
        if len(made.token_ids) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made, replay

    engine = engine_of("qwen3", StepGraph(small))
    same(expected, engine.generate(requests, Sampling()))
    assert engine.fitting.halvings == 0 and engine.graph.usable and engine.graph.replays
    assert tried[0] == len(requests) and tried.count(len(requests)) <= 2, "captured again only after a buffer has grown"


@pytest.mark.parametrize("where", ["a buffer", "a step"])
def test_a_graph_keeps_no_tensor_in_memory_that_is_about_to_be_replaced(where, like_a_gpu, monkeypatch):
    """A graph has its own memory and references the cache: both must be freed before a larger allocation."""
    graph = StepGraph(record)
    engine = engine_of("qwen3", graph)  # before the patches: it tries its cache
    met = Counter()

    def watched(owner, name):
        plain = getattr(owner, name)

        def method(*args, **named):
            met[name] += 1
            assert graph.replay is None and graph.result is None and graph.on_logits is None, f"a graph lives at {name}"
            return plain(*args, **named)

        monkeypatch.setattr(owner, name, method)

    for owner, name in ((RowBuffer, "_move"), (RowBuffer, "keep"), (shared_cache, "prefill")):
        watched(owner, name)
    caches: list[weakref.ref] = []
    plain_join = shared_cache.SharedCache.join

    def join(cache, *args, **named):
        caches.append(weakref.ref(cache))
        return plain_join(cache, *args, **named)

    monkeypatch.setattr(shared_cache.SharedCache, "join", join)
    failed = []

    def fail(time):
        if time > 0 and not failed:
            failed.append(len(caches))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    moved, step = RowBuffer._move, shared_cache.SharedCache._logits
    if where == "a buffer":
        monkeypatch.setattr(RowBuffer, "_move", lambda own, *args: (fail(own.time), moved(own, *args))[1])
    else:
        monkeypatch.setattr(
            shared_cache.SharedCache, "_logits", lambda cache, ids: (fail(cache.buffer.time), step(cache, ids))[1]
        )
    plain_halve = engine.fitting.halve

    def halve(*args, **named):
        gc.collect()
        assert caches[failed[0] - 1]() is None, "the cache that did not fit is still in memory"
        met["halve"] += 1
        plain_halve(*args, **named)

    monkeypatch.setattr(engine.fitting, "halve", halve)
    engine.generate(requests_of(), Sampling())
    assert min(met.values()) >= 1 and set(met) == {"_move", "keep", "prefill", "halve"} and graph.replays > NEW / 2


def test_a_loaded_model_turns_cudnn_attention_off(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_model("llama")  # through `prepare`, as every model
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_step_is_recorded_once_its_shape_has_lasted():
    graph, calls = StepGraph(record), []

    def double(ids):
        calls.append(len(ids))
        return ids * 2

    then, other = (lambda x: x + 1), (lambda x: x - 1)
    for i in range(6):
        assert graph.run(double, then, torch.tensor([i, 3]), 0).tolist() == [2 * i + 1, 7]
    assert graph.captures == 1 and graph.replays == 6 - WARM_STEPS
    assert len(calls) == WARM_STEPS + 2, "called to warm up, to be compared and to be recorded"
    first = graph.run(double, then, torch.tensor([1, 1]), 0)
    graph.run(double, then, torch.tensor([5, 5]), 0)
    assert first.tolist() == [3, 3], "the result of a replay belongs to the caller"
    assert graph.run(double, other, torch.tensor([4, 4]), 0).tolist() == [7, 7], "another function of the logits"
    graph.forget()
    assert graph.run(double, then, torch.tensor([4]), 0).tolist() == [9] and graph.replays == 6
    with pytest.raises(Refused, match="tensor is not permitted"):
        record(lambda: torch.tensor([1]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), front=st.integers(0, 5))
def test_static_buffers_hold_what_plain_ones_hold(seed, front):
    """Rows join, leave and write at random; a static buffer has the same columns, and finite unwritten ones after."""
    rng = np.random.default_rng(seed)
    plain, static = RowBuffer(150), RowBuffer(150, torch.device("cpu"))
    started: list[int] = []
    for _ in range(120):
        if not started or rng.random() < 0.1:
            count = int(rng.integers(1, 4))
            for buffer in (plain, static):
                buffer.join(count, front, min(started, default=buffer.time))
            started += [plain.time] * count
        for buffer in (plain, static):
            if buffer.full:
                buffer.grow(min(started))
        key = torch.from_numpy(rng.random((len(started), 2, 3)))
        (keys, values), (all_keys, all_values) = (buffer.append(0, key, -key) for buffer in (plain, static))
        own = min(static.time - static.base, plain.time - plain.base) + 1  # columns moved at different times
        assert static.column_on_device.tolist() == [static.columns] and static.time_on_device.tolist() == [
            plain.time
        ] == [static.time]
        ended = static.columns + 1
        for part, whole in ((keys, all_keys), (values, all_values)):
            assert torch.equal(part[:, :, part.shape[2] - own :], whole[:, :, ended - own : ended])
            assert torch.equal(part[:, :, :front], whole[:, :, :front])
            assert bool(torch.isfinite(whole).all()), "it is weighed with 0"
        assert all_keys.shape[2] % COLUMNS_MULTIPLE == 0
        for buffer in (plain, static):
            buffer.advance()
        if rng.random() < 0.2:
            kept = np.flatnonzero(rng.random(len(started)) < 0.6)
            order = plain.keep(kept)
            assert order.tolist() == static.keep(kept).tolist()
            started = [started[i] for i in order]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("prompt", [20, 200], ids=["by row", "by prompt"])
def test_cuda_graphs_sample_what_single_launches_sample(dtype, prompt):
    """The graph itself. Greedy and sampled, rows that leave and rows that join."""
    model = tiny_model("qwen3", spread=1.5).cuda()
    ids = [tuple(5 + (7 * p + i) % 50 for i in range(prompt - p)) for p in range(6)]
    requests = [Request(4 * p + g, p, g, ids[p]) for p in range(6) for g in range(4)]
    for how in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.9)):
        for budget in (None, 10 * (prompt + NEW)):
            plain = NativeEngine(model, range(0, 5), NEW, 3, dtype, budget, cuda_graphs=False)
            graphs = NativeEngine(model, range(0, 5), NEW, 3, dtype, budget)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                expected, found = plain.generate(requests, how), graphs.generate(requests, how)
            assert graphs.graph.replays > 20
            if dtype == "fp32":
                same(expected, found)
            else:  # other kernels round differently; after one different token a sample is another sample
                alike = [
                    a.token_ids[:8].tolist() == b.token_ids[:8].tolist() for a, b in zip(expected, found, strict=True)
                ]
                assert np.mean(alike) > 0.5
