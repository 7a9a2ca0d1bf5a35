"""Memory runs out: the work is halved, its results stay the same, and the smallest piece fails with a clear line."""

import pytest
import torch

from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import OutOfMemory, ran_out
from grpo.training.metrics import Tally
from grpo.training.special_micro_batches import halves
from tests.forward.test_logprobs import micro_batch
from tests.support.rank_jobs import config, injected_step, make_policy
from tests.support.tiny import tiny_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
REQUESTS = [Request(n, n // 3, n % 3, (5, 6 + n // 3)) for n in range(12)]


def crowded(max_rows):
    """An engine that runs out of memory above so many rows."""
    engine = NativeEngine(tiny_model("qwen3", spread=2.0), [0], 8, 1)
    words = engine.model.get_input_embeddings()  # what every forward begins with
    plain = words.forward

    def forward(input_ids):
        if len(input_ids) > max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(input_ids)

    words.forward = forward
    return engine


def test_a_rollout_that_does_not_fit_is_halved_and_samples_the_same():
    whole = NativeEngine(tiny_model("qwen3", spread=2.0), [0], 8, 1).generate(REQUESTS, Sampling())
    engine = crowded(4)
    parts = engine.generate(REQUESTS, Sampling())
    assert [c.token_ids.tolist() for c in parts] == [c.token_ids.tolist() for c in whole]
    assert [c.row for c in parts] == list(range(12))
    assert engine.fitting.halvings == 2 and engine.fitting.size == 3, "12 and 6 rows failed, 3 fit"
    engine.generate(REQUESTS, Sampling())
    assert engine.fitting.halvings == 2, "the size was not remembered"


def test_a_single_row_that_does_not_fit_ends_with_what_to_change():
    engine = crowded(0)
    with pytest.raises(
        OutOfMemory, match=r"rollout: out of memory .* 1 rows of up to 2 \+ 8 tokens.*max_generate"
    ) as e:
        engine.generate(REQUESTS, Sampling())
    assert e.value.code == 2 and e.value.on_one_rank


def test_other_errors_are_not_taken_for_it():
    engine = NativeEngine(tiny_model("qwen3"), [0], 8, 1)
    engine.model.base_model.forward = lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        engine.generate(REQUESTS, Sampling())
    assert ran_out(MemoryError()) and not ran_out(KeyError("out of memory"))


def test_halves_are_the_rows_cut_to_their_own_length():
    micro = micro_batch()
    parts = halves(micro)
    assert tuple(n for part in parts for n in part.rows) == micro.rows
    assert sum(int(part.trained.sum()) for part in parts) == int(micro.trained.sum())
    for part in parts:
        assert part.trained.any(0).all() and part.input_ids.shape[1] == int(part.positions[part.trained].max()) + 1
    torch.testing.assert_close(torch.cat([p.target_ids[p.trained] for p in parts]), micro.target_ids[micro.trained])
    assert all(getattr(p, name).is_contiguous() for p in parts for name in ("trained", "target_ids", "positions"))


@pytest.mark.parametrize("sharded", [False, True])
def test_an_update_that_never_fits_stops(sharded, monkeypatch):
    cfg = config()
    policy = make_policy(cfg, ALONE)
    monkeypatch.setattr(type(policy.backend), "even_work", sharded)

    def loss(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    policy.loss = loss
    said = "cannot try again in smaller.*micro_batch_tokens" if sharded else "update: out of memory with the smallest"
    with pytest.raises(OutOfMemory, match=said):
        injected_step(cfg, ALONE, policy, 0, 1, 0, Tally())
