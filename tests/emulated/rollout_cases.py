"""Rollouts on the emulated device: the tokens of the CPU, no tensor left on the CPU, and few device syncs."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from grpo.rollout import Request, row_buffer, shared_cache
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.rollout.stop_strings import StopStrings
from tests import emulated
from tests.support.step_tape import record
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
NEW = 40
PREFIX = tuple(20 + i % 60 for i in range(20))
SHORT, LONG = (3, 9, 5, 14, 4, 7), (150, 140, 9, 150)  # tokens of prompts; beyond 128 they are read by prompt


@pytest.fixture(scope="module")
def device():
    torch.set_num_threads(1)
    return emulated.register()


def requests_of(prefix, lengths, group=3):
    prompts = [(*prefix, *(5 + (7 * p + i) % 50 for i in range(n))) for p, n in enumerate(lengths)]
    return [Request(p * group + g, p, g, ids) for p, ids in enumerate(prompts) for g in range(group)]


def engine_on(where, architecture, dtype="fp32", stop_ids=range(12), **how):
    """Many stop ids, so that rows leave at different times."""
    return NativeEngine(tiny_model(architecture, spread=1.5).to(where), stop_ids, NEW, 3, dtype, **how)


def same(expected, found, atol=1e-5):
    assert [c.row for c in expected] == [c.row for c in found]
    for a, b in zip(expected, found, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=atol)
        assert (a.entropy is None) == (b.entropy is None)
        if a.entropy is not None:
            np.testing.assert_allclose(a.entropy, b.entropy, atol=10 * atol)
        assert (a.support is None) == (b.support is None)
        if a.support is not None:
            assert a.support.tolist() == b.support.tolist()


DRAWS = {
    "plain": Sampling(),
    "top_p": Sampling(top_p=0.8, records_entropy=True),
    "top_k, min_p": Sampling(top_k=9, min_p=0.05, temperature=0.7),
    "greedy": Sampling(temperature=0.0),
    "clamped": Sampling(logit_clamp=2.0, records_entropy=True),
}


@pytest.mark.parametrize("draws", list(DRAWS))
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_the_engine_samples_what_it_samples_on_the_cpu(architecture, lengths, draws, device):
    """With and without a common prefix, all rows at once and within a budget of tokens."""
    for prefix in ((), PREFIX):
        requests = requests_of(prefix, lengths)
        for budget in (None, 6 * (len(prefix) + max(lengths) + NEW)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # gemma2 cannot share prompts, and warns
                expected, found = (
                    engine_on(where, architecture, max_tokens=budget).generate(requests, DRAWS[draws])
                    for where in (CPU, device)
                )
            same(expected, found)


@pytest.mark.parametrize("draws", list(DRAWS))
def test_a_vocabulary_of_several_blocks_is_sampled_alike(draws, device):
    expected, found = (
        NativeEngine(tiny_model("llama", 1300, spread=1.5).to(where), range(40), NEW, 3).generate(
            requests_of((), SHORT), DRAWS[draws]
        )
        for where in (CPU, device)
    )
    same(expected, found)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_replayed_steps_sample_the_same_without_a_device_sync(architecture, lengths, device):
    """A tape in place of a CUDA graph; while it records, no device sync and no copy from the host is allowed."""
    waits = []

    def watched(step):
        with emulated.counted() as reads:
            made = record(step)
        waits.append(dict(reads.seen))
        return made

    for budget in (None, 6 * (max(lengths) + NEW)):
        requests = requests_of((), lengths)
        expected = engine_on(CPU, architecture, max_tokens=budget).generate(requests, Sampling())
        engine = engine_on(device, architecture, max_tokens=budget)
        engine.graph = StepGraph(watched)
        same(expected, engine.generate(requests, Sampling()))
        assert engine.graph.replays > 0 and engine.graph.usable
    assert waits and not any(waits), waits


def test_stop_strings_end_rows_as_on_the_cpu(device):
    """The tokens are read with the finished rows, every few steps, outside of what a graph records."""
    stops = StopStrings(tiny_tokenizer(), ["1", "a", "s,"])
    requests = requests_of((), SHORT)
    expected = engine_on(CPU, "qwen3", stop_ids=[], stop_strings=stops).generate(requests, Sampling())
    assert {one.finish for one in expected} == {"stop", "length"}
    for budget in (None, 6 * (max(SHORT) + NEW)):
        engine = engine_on(device, "qwen3", stop_ids=[], stop_strings=stops, max_tokens=budget)
        engine.graph = StepGraph(record)
        same(expected, engine.generate(requests, Sampling()))
        assert engine.graph.replays > 0 and engine.graph.usable


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("draws", ["plain", "top_p"])
def test_decode_steps_have_no_device_sync_but_the_read_of_finished_rows(lengths, draws, device):
    engine = engine_on(device, "qwen3", stop_ids=[])
    seen = []
    for tokens in (NEW - 2 * engine.read_done_steps, NEW):
        engine.max_new_tokens = tokens
        with emulated.counted() as reads:
            engine.generate(requests_of(PREFIX, lengths), DRAWS[draws])
        seen.append(reads.seen)
    [((what, where), count)] = (seen[1] - seen[0]).items()
    assert (what, count) == ("to host", 2) and where.startswith("engine.py")


@pytest.mark.parametrize("forgotten", ["uniforms", "lengths", "buffer"])
def test_a_rollout_with_a_tensor_left_on_the_cpu_is_refused(forgotten, device, monkeypatch):
    engine = engine_on(device, "qwen3")
    if forgotten == "uniforms":
        uniforms = lambda batch: torch.full((len(batch.ages),), 0.5, dtype=torch.float64)  # noqa: E731
        monkeypatch.setattr("grpo.rollout.engine.Batch._uniforms", uniforms)
    elif forgotten == "lengths":
        plain = shared_cache.prefill
        moved = lambda *args: dataclasses.replace(plain(*args), lengths=plain(*args).lengths.cpu())  # noqa: E731
        monkeypatch.setattr(shared_cache, "prefill", moved)
    else:
        monkeypatch.setattr(
            row_buffer.RowBuffer,
            "append",
            lambda buffer, layer, key, value: (key[:, :, None].cpu(), value[:, :, None].cpu()),
        )
    with pytest.raises(RuntimeError, match=r"same device|on cpu or on"):
        engine.generate(requests_of((), SHORT), Sampling())
