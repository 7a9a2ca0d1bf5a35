"""Plans, micro-batches and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.settings import Config
from grpo.runtime.shares import cut_for, split_evenly
from grpo.training.collate import collate
from grpo.training.minibatches import assign, cut_micro_batches, make_plan, trainers_of
from grpo.types import Prompt, TrainRow


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    cut = cut_micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(n for micro in cut for n in micro) == list(range(len(lengths)))
    for micro in cut:
        assert len(micro) == 1 or len(micro) * max(lengths[n] for n in micro) <= budget


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_owners_are_balanced(costs, world_size):
    owners = assign(costs, world_size)
    loads = [sum(c for c, o in zip(costs, owners) if o == rank) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.integers(1, 8), st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_a_plan_leaves_out_only_rows_without_gradient(num_prompts, group, minibatches, seed):
    rng = np.random.default_rng(seed)
    minibatches = min(minibatches, num_prompts)
    prompts = [Prompt(p, "", tuple(range(int(rng.integers(1, 9)))), {}) for p in range(num_prompts)]
    lengths = rng.integers(0, 12, num_prompts * group)
    advantages = rng.choice([-1.0, 0.0, 1.0], num_prompts * group)
    cfg = Config(num_generations=group, num_minibatches=minibatches, micro_batch_tokens=40)
    plans = [make_plan(cfg, prompts, lengths, advantages, world_size) for world_size in (1, 3)]
    exact = Config(**{**vars(cfg), "deterministic": True})
    cuts = [make_plan(exact, prompts, lengths, advantages, world_size) for world_size in (1, 3)]
    assert [m.micro_batches for m in cuts[0]] == [m.micro_batches for m in cuts[1]], "the same for any world"
    assert [n for m in plans[0] for n in m.rows] == list(range(num_prompts * group))
    assert set(trainers_of(plans[1])) == {n for n in range(len(lengths)) if lengths[n] > 0 and advantages[n] != 0}
    with_kl = make_plan(Config(**{**vars(cfg), "beta": 0.1}), prompts, lengths, advantages, 2)
    assert set(trainers_of(with_kl)) == {n for n in range(len(lengths)) if lengths[n] > 0}
    for minibatch in plans[1]:
        assert sorted(n for rank in range(3) for micro in minibatch.of_rank(rank) for n in micro) == sorted(
            n for micro in minibatch.micro_batches for n in micro
        )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("num_prompts", "group"), [(1, 8), (2, 8), (8, 8), (3, 8), (40, 8)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_rank_idles_through_an_update_of_default_settings(num_prompts, group, ranks, deterministic):
    """Tokens of the busiest rank, where every row is as long. To cut three groups for four ranks would not pay."""
    prompts = [Prompt(p, "", (p, *range(90)), {}) for p in range(num_prompts)]
    lengths, advantages = np.full(num_prompts * group, 24), np.ones(num_prompts * group)
    cfg = Config(num_generations=group, deterministic=deterministic)
    [minibatch] = make_plan(cfg, prompts, lengths, advantages, ranks)
    loads = [
        sum(91 * len({n // group for n in micro}) + 24 * len(micro) for micro in minibatch.of_rank(rank))
        for rank in range(ranks)
    ]
    assert max(loads) <= (1.34 if (num_prompts, ranks) == (3, 4) else 1.2) * sum(loads) / ranks
    assert max(len(micro) for micro in minibatch.micro_batches) * 24 <= cfg.micro_batch_tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(60, 120), st.integers(1, 5))
def test_micro_batches_are_as_even_as_their_number_allows(lengths, most, shares):
    cut = lambda budget: cut_micro_batches(range(len(lengths)), lengths, budget)  # noqa: E731
    found, plain = cut_for(shares, most, cut), cut(most)
    assert sorted(n for micro in found for n in micro) == list(range(len(lengths)))
    assert len(plain) <= len(found) <= -(-len(plain) // shares) * shares or len(found) == len(lengths)
    assert all(len(micro) * lengths[micro[0]] <= most for micro in found)


@given(st.integers(1, 50), st.integers(1, 10))
def test_split_evenly(count, parts):
    ranges = split_evenly(count, parts)
    assert [i for r in ranges for i in r] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def row(n, prompt, ids):
    return TrainRow(n, prompt, np.array(ids, np.int32), np.full(len(ids), -1.0, np.float32), None, 2.0)


def test_collate_aligns_predictions_with_targets():
    micro = collate([row(4, (7, 8, 9), [1, 2]), row(6, (5,), [3])], {4: 0.5, 6: 0.25}, torch.device("cpu"))
    assert micro.input_ids.tolist() == [[7, 8, 9, 1], [5, 0, 0, 0]]
    assert micro.positions.tolist() == [[2, 3], [0, 0]]
    assert micro.target_ids.tolist() == [[1, 2], [3, 0]]
    assert micro.trained.tolist() == [[True, True], [True, False]]
    assert micro.weights.tolist() == [[0.5, 0.5], [0.25, 0.0]]
    assert micro.rows == (4, 6)


@pytest.mark.parametrize("ids", [[0, 0], [9, 0]])
def test_masks_come_from_lengths_never_from_ids(ids):
    """pad == eos == 0 and a pad token in the middle of the text: every sampled token counts."""
    micro = collate([row(0, (1,), ids), row(1, (1,), [4, 4, 4])], {0: 1.0, 1: 1.0}, torch.device("cpu"))
    assert micro.trained.tolist() == [[True, True, False], [True, True, True]]
