"""The arithmetic of the benchmarks: floors against hand counts, slopes against exact power laws, thresholds.

No times: what a machine takes is the benchmarks' own business.
"""

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import floors
from benchmarks.growth import AXES, Point, never_ends, slope, slopes, turns
from benchmarks.step_profile import probed
from benchmarks.time_to_reward import Race, best, ratio
from benchmarks.workloads import word_model

# body 10 parameters, head 6, 20 in all; 3 words; 4 FLOPs for a pair of tokens; 2 numbers kept a token; 4 bytes each
SHAPE = floors.Shape(10, 6, 20, 3, attention=4, kept=2)
# Prompts of 3 and 2 tokens, two completions each, of 3, 1, 2 and 2 tokens; rows 0 and 3 carry gradient.
ROWS = floors.Rows([(5, 6, 7), (8, 9)], 2, [3, 1, 2, 2], [[0, 3]])


def test_prefill_by_hand():
    # 5 tokens x 2 x 10; they see 1+2+3 and 1+2 tokens; two prompts meet the head, 2 x 6 each
    assert floors.prefill(SHAPE, ROWS) == floors.Work(5, 100 + 9 * 4 + 24, (10 + 6 + 5 * 2) * 4)
    twice = floors.Rows([(5, 6, 7), (5, 6, 7)], 2, ROWS.lengths, ROWS.minibatches)
    assert floors.prefill(SHAPE, twice).tokens == 3, "a prompt that is asked twice is computed once"


def test_what_all_prompts_begin_with_is_needed_once():
    header = tuple(range(100, 120))
    rows = floors.Rows([(*header, 1), (*header, 2, 3)], 1, [2, 2], [[0, 1]])
    assert floors.prefill(SHAPE, rows).tokens == 20 + 1 + 2
    assert floors.forward_backward(SHAPE, rows).tokens == 20 + 1 + 2 + 1 + 1
    # one call; header once, 1 and 2 tokens of prompts, one own token of each row
    assert floors.decode(SHAPE, rows).bytes == (16 + (20 + 3 + 2) * 2) * 4


def test_decode_by_hand():
    # inputs: two of row 0 (at positions 3, 4), none of row 1, one of rows 2 and 3 (at position 2)
    flops = 4 * 20 + (4 + 5 + 3 + 3) * 4 + 4 * 12
    # call 1: prompts 3 + 2, three rows with one own token; call 2: prompt 3, row 0 with two
    assert floors.decode(SHAPE, ROWS) == floors.Work(4, flops, (2 * 16 + (5 + 3 + 3 + 2) * 2) * 4)
    done = floors.Rows([(1,)], 1, [1], [[0]])
    assert floors.decode(SHAPE, done) == floors.Work()


def test_update_by_hand():
    # prompts of 3 and 2, then 2 tokens of row 0 and 1 of row 3; 5 predictions
    forward = 8 * 20 + (6 + 3 + 4 + 5 + 3) * 4 + 5 * 12
    assert floors.forward_backward(SHAPE, ROWS) == floors.Work(8, 3 * forward, 2 * 16 * 4 + 20 * 4)
    assert floors.optimizer(SHAPE, ROWS).bytes == 8 * 4 * 20
    twice = floors.Rows(ROWS.prompts, 2, ROWS.lengths, ROWS.minibatches, passes=2, reference=True)
    assert floors.forward_backward(SHAPE, twice).flops == 6 * forward
    assert floors.logprobs(SHAPE, twice) == floors.Work(8, forward, 16 * 4)
    assert floors.logprobs(SHAPE, ROWS) == floors.Work()
    nothing = floors.Rows(ROWS.prompts, 2, ROWS.lengths, [[]])
    assert floors.forward_backward(SHAPE, nothing) == floors.Work()


def test_the_floor_is_the_larger_of_the_two():
    ceilings = floors.Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.floor_s(floors.Work(0, 300, 20)) == 3.0 and ceilings.bound(floors.Work(0, 300, 20)) == "FLOPs"
    assert ceilings.floor_s(floors.Work(0, 100, 20)) == 2.0 and ceilings.bound(floors.Work(0, 100, 20)) == "bytes"


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_numbers(tied):
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=tied,
    )
    # a layer: q 8x16, k and v 8x8, o 16x8, three matrices 8x12, norms 2 x 8 and 2 x 4; after them one of 8
    body = 2 * (128 + 128 + 128 + 288 + 24) + 8
    shape = floors.shape_of(Qwen3ForCausalLM(config), width=2)
    assert shape == floors.Shape(body, 88, body + 88 * (1 if tied else 2), 11, 4 * 2 * 16, 2 * 2 * 8, 2)


def test_steps_are_done_twice_and_take_turns():
    found = [(number // 2, probed(number)) for number in range(8)]
    assert sorted(found) == [(pair, way) for pair in range(4) for way in (False, True)]
    assert [probed(number) for number in (0, 2, 4, 6)] == [False, True, False, True]


def test_slopes_of_power_laws():
    xs = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    points = [Point(x, {"step_s": max(4.0, x) ** 2}) for x in xs]  # flat, then quadratic
    over_all, upper = slopes(points, "step_s")
    assert upper == pytest.approx(2.0) and over_all < 1.7


def test_axes_have_five_points_that_are_visited_equally_often():
    assert all(len(values) == 5 and len(set(values)) == 5 for values in AXES.values())
    assert sorted(turns(5, 3)) == sorted([0, 1, 2, 3, 4] * 3)
    assert turns(5, 2)[4:6] == [4, 4]


def test_the_model_of_the_growth_benchmark_never_ends(tmp_path):
    """Its first word, which ends a completion, has a probability below 1e-6; that of the untouched model is 1 in 50."""
    word_model(tmp_path, 50, hidden_size=64, num_hidden_layers=2, head_dim=16)
    ids = torch.arange(1, 41)[None]
    chance = lambda: float(  # noqa: E731
        Qwen3ForCausalLM.from_pretrained(tmp_path / "model")(ids).logits.detach().softmax(-1)[0, :, 0].max()
    )
    before = chance()
    parameters = never_ends(tmp_path / "model")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "model")
    others = model(ids).logits.detach().softmax(-1)[0, :, 1:]
    assert before > 5e-3 and chance() < 1e-6
    assert float(others.max()) < 0.2, "the other words must stay about equally likely"
    assert parameters == sum(p.numel() for p in model.parameters()) - 50 * 64


def run(rewards, threshold=0.8, max_steps=20, cap_s=100.0):
    """A race on given rewards, a second a step."""
    one = Race(threshold, max_steps, cap_s)
    for reward in rewards:
        if not one.over:
            one.add(reward, 1.0, 10.0)
    return one


def test_the_threshold_is_that_of_a_mean_over_five_steps():
    assert run([1.0] * 4).reached is None, "four steps are too few"
    first = run([1.0] * 9)
    assert (first.reached, first.at(first.seconds), first.at(first.tokens)) == (5, 5.0, 50.0)
    late = run([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert late.reached == len(late.rewards) == 6  # (0 + 4) / 5
    never = run([0.79] * 30)
    assert never.reached is None and len(never.rewards) == 20 and never.at(never.seconds) == math.inf
    assert str(never).startswith("not reached (last mean 0.79 after 20 steps")
    assert len(run([0.0] * 30, cap_s=7.0).rewards) == 7


def test_the_best_rate_is_the_fastest_else_the_nearest():
    fast, slow, low, lower = run([1.0] * 5), run([0.0, *[1.0] * 6]), run([0.5] * 20), run([0.4] * 20)
    assert best({1.0: slow, 2.0: fast, 3.0: low}) == 2.0
    assert best({1.0: lower, 2.0: low}) == 2.0


def test_ratios_know_what_was_not_reached():
    assert ratio([2.0, 4.0, 3.0], [6.0, 8.0, 9.0]) == "2.67 (seeds: 3.00, 2.00, 3.00)"
    assert ratio([2.0], [math.inf]).startswith("inf")
    assert ratio([math.inf], [2.0]).startswith("nan")
