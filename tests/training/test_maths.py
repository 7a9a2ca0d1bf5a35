"""Closed-form values: advantages, losses, guards, schedules, masks."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.settings import Config
from grpo.data.gold_answers import hash_answer
from grpo.forward.logprobs import bounded_logits
from grpo.training.advantages import equal_groups, group_advantages
from grpo.training.losses import LossInputs, k3, ppo_clip, row_weights

NAN = float("nan")


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        ([1, 1, 0, 0], [0.866025, 0.866025, -0.866025, -0.866025]),
        ([2.5, 2, 0.5, 0], [1.05021, 0.630126, -0.630126, -1.05021]),
        ([2.98] * 8, [0] * 8),
        ([0.1, 0.1 + 1e-9], [0, 0]),
        ([1.0], [0]),
        ([1, NAN, 0], [0.707107, 0, -0.707107]),
        ([NAN, 3, NAN], [0, 0, 0]),
    ],
)
def test_group_advantages(rewards, expected):
    np.testing.assert_allclose(group_advantages(np.array([rewards]))[0], expected, atol=1e-6)


def test_advantages_are_per_group():
    rewards = np.array([[1, 0], [3, 2]])
    np.testing.assert_allclose(group_advantages(rewards).ravel(), [0.707107, -0.707107, 0.707107, -0.707107], atol=1e-6)


def test_equal_rewards_give_exactly_zero_where_a_naive_mean_does_not():
    """The control: fp32 with a naive mean leaves a residue of one sign, which 1e-8 blows up."""
    same = np.full(7, 2.98, dtype=np.float32)
    residue = (same - same.sum() / np.float32(7)) / (same.std(ddof=1) + np.float32(1e-8))
    assert abs(residue).max() > 1e-3
    assert (group_advantages(same[None]) == 0).all()


def test_the_clip_acts_on_scaled_advantages_only():
    """[80, 0] unscaled is +-40, and stays so whatever the clip is; scaled it is +-0.707, which a clip of 0.5 cuts."""
    np.testing.assert_allclose(group_advantages(np.array([[1.0, 0.0]]), scale=False), [[0.5, -0.5]])
    np.testing.assert_allclose(group_advantages(np.array([[80.0, 0.0]]), scale=False, clip=10.0), [[40, -40]])
    np.testing.assert_allclose(group_advantages(np.array([[80.0, 0.0]]), scale=True, clip=0.5), [[0.5, -0.5]])


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=16), st.integers(-50, 50), st.integers(1, 9))
def test_advantages_against_exact_arithmetic(rewards, shift, scale):
    ours = group_advantages(np.array([rewards], dtype=float), clip=100.0)[0]
    mean = Fraction(sum(rewards), len(rewards))
    variance = sum((Fraction(r) - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    exact = [0.0 if variance == 0 else float(Fraction(r) - mean) / (math.sqrt(variance) + 1e-8) for r in rewards]
    np.testing.assert_allclose(ours, exact, atol=1e-9)
    assert abs(ours).max() <= math.sqrt(len(rewards) - 1) + 1e-9
    moved = group_advantages(np.array([rewards], dtype=float) * scale + shift, clip=100.0)[0]
    np.testing.assert_allclose(moved, ours, atol=1e-6)
    assert equal_groups(np.array([rewards]))[0] == (len(set(rewards)) == 1)


def clipped(log_ratio, advantages, low=0.2, high=0.2):
    """The surrogate of tokens that all count, from their log-ratios."""
    zeros = torch.zeros_like(log_ratio)
    inputs = LossInputs(log_ratio, zeros, None, zeros, advantages, torch.ones_like(log_ratio, dtype=torch.bool))
    return ppo_clip(inputs, Config(clip_eps=low, clip_eps_high=high))[0]


@pytest.mark.parametrize("ratio, gain, expected", [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8)])
def test_ppo_clip(ratio, gain, expected):
    loss = clipped(torch.tensor([[math.log(ratio)]]), torch.tensor([float(gain)]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_ppo_clip_has_its_own_upper_bound():
    assert clipped(torch.tensor([[math.log(1.5)]]), torch.tensor([1.0]), 0.2, 0.28).item() == pytest.approx(-1.28)


@pytest.mark.parametrize("gap, expected", [(0.5, 0.106531), (-0.5, 0.148721), (0.0, 0.0), (3.0, 2.049787)])
def test_k3_has_the_papers_sign(gap, expected):
    """gap = new - ref. The wrong sign would give 16.09 at +3."""
    assert k3(torch.tensor([gap]), torch.tensor([0.0])).item() == pytest.approx(expected, abs=1e-6)


@given(st.floats(-200, 200), st.floats(-200, 200), st.sampled_from([-1.0, 1.0]))
def test_extreme_log_ratios_stay_finite(log_ratio, ref, gain):
    """Finite loss and finite gradient; without the clamp, exp(100) * 0 in min's dead branch gives NaN."""
    new = torch.tensor([[log_ratio]], requires_grad=True)
    loss = (clipped(new, torch.tensor([gain])) + 0.04 * k3(new, torch.tensor([[ref]]))).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(new.grad.item())


def test_log_ratio_is_clamped_at_20():
    loss = clipped(torch.tensor([[50.0]]), torch.tensor([-1.0]))
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-6)


def test_row_mean_and_token_mean_differ():
    """Per-token losses [1] and [0, 0, 0]: 0.5 by rows, 0.25 by tokens."""
    losses = [[1.0], [0.0, 0.0, 0.0]]

    def total(how):
        return sum(weight * sum(row) for weight, row in zip(row_weights(how, [1, 3], 8), losses))

    assert total("grpo") == 0.5
    assert total("dapo") == 0.25
    assert total("dr_grpo") == pytest.approx(1 / 16)


def test_empty_rows_stay_in_the_denominator():
    assert row_weights("grpo", [0, 2], 8) == [0.5, 0.25]
    assert row_weights("dapo", [0, 0], 8) == [1.0, 1.0]


def test_logit_clamp_centres_first():
    """A shift changes nothing; a range beyond ±100 is cut to it, and counted."""
    bounded, moved = bounded_logits(torch.tensor([[1e4, 1e4 - 3.0]]), 1.0, 100.0)
    assert bounded.softmax(-1)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-6) and moved.item() == 0
    bounded, moved = bounded_logits(torch.tensor([[1e4, -1e4, 0.0]]), 1.0, 100.0)
    assert bounded.tolist() == [[100.0, -100.0, 0.0]] and moved.item() == 2


def test_temperature_divides_after_the_clamp():
    assert bounded_logits(torch.tensor([[1e4, -1e4]]), 2.0, 100.0)[0].tolist() == [[50.0, -50.0]]


@pytest.mark.parametrize("text, gold", [("a #### 1,000 ", "1,000"), ("no marker", None), ("#### 1\n#### 2", "2")])
def test_hash_answer(text, gold):
    assert hash_answer(text) == gold
