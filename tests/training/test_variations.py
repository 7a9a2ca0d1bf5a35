"""Variations of the algorithm by hand: surrogates, ratios, KL estimates, sampler corrections, advantages, masks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from grpo.config.algorithm import TABLE
from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.runtime.distributed import start
from grpo.training.losses import LossInputs, policy_loss, ratio_of
from grpo.training.metrics import Tally
from grpo.training.other_advantages import advantages_from, normalize_each
from grpo.training.sampler_correction import with_sample_size
from grpo.training.scoring import advantages_of
from grpo.training.surrogates import SURROGATES
from grpo.types import FACTS, Completion, Table

NEEDED = dict(model="m", data="d", rewards={"mark_reward": 1.0})
NEW = [[-1.0, -0.5, -2.0], [-0.2, -3.0, math.nan]]
OLD = [[-1.4, -0.7, -1.5], [-0.9, -2.0, 0.0]]
TRAINED = [[True, True, True], [True, True, False]]


def inputs(new=NEW, old=OLD, gains=(1.0, -2.0), sampler=None, reference=None):
    logprobs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    sampled = tensor(old if sampler is None else sampler)
    ref = None if reference is None else tensor(reference)
    return LossInputs(logprobs, tensor(old), ref, sampled, tensor(gains), torch.tensor(TRAINED))


def loss_and_gradient(cfg, given, trust_sampler=True):
    """Of the trained tokens, row by row."""
    loss, _ = policy_loss(given, torch.ones(2, 3), cfg, SURROGATES[cfg.surrogate], trust_sampler)
    [gradient] = torch.autograd.grad(loss.sum(), given.logprobs)
    return [[values[row][given.trained[row]].tolist() for row in (0, 1)] for values in (loss, gradient)]


def rows(values):
    return [pytest.approx(row) for row in values]


LOG_RATIOS = [[0.4, 0.2, -0.5], [0.7, -1.0]]
RATIOS = [[math.exp(x) for x in row] for row in LOG_RATIOS]
MEANS = [sum(row) / len(row) for row in LOG_RATIOS]


def test_dual_clip_bounds_the_ratio_where_the_advantage_is_negative():
    plain, dual = (Config(clip_ratio_max=bound) for bound in (None, 1.5))
    assert loss_and_gradient(plain, inputs())[0] == rows([[-1.2, -1.2, -RATIOS[0][2]], [2 * RATIOS[1][0], 2 * 0.8]])
    loss, gradient = loss_and_gradient(dual, inputs())
    assert loss == rows([[-1.2, -1.2, -RATIOS[0][2]], [2 * 1.5, 2 * 0.8]])
    assert gradient == rows([[0, 0, -RATIOS[0][2]], [0, 0]])


def test_cispo_clips_a_weight_and_keeps_every_gradient():
    cfg = Config(surrogate="cispo", clip_eps_high=0.3)
    loss, gradient = loss_and_gradient(cfg, inputs())
    weights = [[min(r, 1.3) for r in row] for row in RATIOS]
    assert gradient == rows([[-w for w in weights[0]], [2 * w for w in weights[1]]])
    assert loss[0] == pytest.approx([-w * x for w, x in zip(weights[0], NEW[0], strict=True)])


def test_sapo_is_a_gate_with_a_temperature_for_each_sign():
    cfg = Config(surrogate="sapo", sapo_temperature=0.5, sapo_temperature_negative=2.0)
    loss, gradient = loss_and_gradient(cfg, inputs())
    gate = lambda tau, r: 4 / tau / (1 + math.exp(-tau * (r - 1)))  # noqa: E731
    slope = lambda tau, r: gate(tau, r) * (1 - tau * gate(tau, r) / 4) * tau * r  # noqa: E731
    assert loss == rows([[-gate(0.5, r) for r in RATIOS[0]], [2 * gate(2.0, r) for r in RATIOS[1]]])
    assert gradient == rows([[-slope(0.5, r) for r in RATIOS[0]], [2 * slope(2.0, r) for r in RATIOS[1]]])


def test_gmpo_is_a_geometric_mean_of_clipped_ratios():
    cfg = Config(surrogate="gmpo", clip_eps=0.3, clip_eps_high=0.25)
    loss, gradient = loss_and_gradient(cfg, inputs())
    means = [math.exp((0.25 + 0.2 - 0.5) / 3), math.exp((0.7 - 0.3) / 2)]
    assert loss == rows([[-means[0]] * 3, [2 * means[1]] * 2])
    assert gradient == rows([[0.0, -means[0], -means[0]], [2 * means[1], 0.0]])  # without the clipped tokens


def test_reinforce_has_no_ratio():
    loss, gradient = loss_and_gradient(Config(surrogate="reinforce"), inputs())
    assert loss == rows([[1.0, 0.5, 2.0], [-0.4, -6.0]]) and gradient == rows([[-1.0] * 3, [2.0] * 2])


def test_a_sequence_has_one_ratio():
    """The mean over trained tokens alone: the NaN behind row 1 is no part of it."""
    given, wide = inputs(), dict(clip_eps=0.99, clip_eps_high=9.0)
    means = [math.exp(mean) for mean in MEANS]
    for ratio in ("sequence", "sequence_token"):
        found = ratio_of(given, Config(ratio=ratio)).detach()
        assert [found[0].tolist(), found[1, :2].tolist()] == rows([[means[0]] * 3, [means[1]] * 2])
    # each token moves its row's one ratio, by a share; with sequence_token only itself
    loss, gradient = loss_and_gradient(Config(ratio="sequence", **wide), given)
    assert loss == rows([[-means[0]] * 3, [2 * means[1]] * 2])
    assert gradient == rows([[-means[0]] * 3, [2 * means[1]] * 2])  # 3 tokens x a third
    uneven = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for ratio, expected in (("sequence", [-means[0] / 3] * 3), ("sequence_token", [-means[0], 0.0, 0.0])):
        loss, _ = policy_loss(given, uneven, Config(ratio=ratio, **wide), trust_sampler=True)
        [gradient] = torch.autograd.grad(loss.sum(), given.logprobs)
        assert gradient[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", TABLE)
def test_on_policy_all_surrogates_have_the_gradient_of_reinforce(surrogate, ratio):
    given = inputs(old=[[-1.0, -0.5, -2.0], [-0.2, -3.0, 0.0]])
    _, gradient = loss_and_gradient(Config(surrogate=surrogate, ratio=ratio), given)
    assert gradient == rows([[-1.0] * 3, [2.0] * 2])


def test_estimates_of_the_kl():
    reference = [[-1.3, -0.5, -1.0], [-0.2, -3.5, 0.0]]
    gaps = [[-0.3, 0.0, 1.0], [0.0, -0.5]]
    k3 = [[math.exp(x) - x - 1 for x in row] for row in gaps]
    expected = {
        "k3": k3,
        "k2": [[x * x / 2 for x in row] for row in gaps],
        "k3_weighted": [[a * b for a, b in zip(*pair, strict=True)] for pair in zip(k3, RATIOS, strict=True)],
    }
    for estimator, values in expected.items():
        given = inputs(gains=(0.0, 0.0), reference=reference)
        loss, gradient = loss_and_gradient(Config(beta=0.1, kl_estimator=estimator), given)
        assert loss == rows([[0.1 * x for x in row] for row in values]), estimator
        if estimator == "k2":
            assert gradient == rows([[-0.1 * x for x in row] for row in gaps])


def test_k3_weighted_has_the_gradient_of_the_kl():
    """Over all tokens of a vocabulary, each with its probability: sum p (k3)' alone has another."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.1, -0.5, 0.0], dtype=torch.float64).log_softmax(-1)
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - reference)).sum()
    [wanted] = torch.autograd.grad(exact, logits)
    found = {}
    for estimator in ("k3", "k3_weighted"):
        logprobs = logits.log_softmax(-1)[None]
        old, trained = logprobs.detach(), torch.ones(1, 4, dtype=torch.bool)
        one = LossInputs(logprobs, old, reference[None], old, torch.zeros(1), trained)
        cfg = Config(beta=1.0, kl_estimator=estimator)
        loss, _ = policy_loss(one, logits.softmax(-1).detach()[None], cfg, trust_sampler=True)
        [found[estimator]] = torch.autograd.grad(loss.sum(), logits)
    assert float((found["k3_weighted"] - wanted).norm()) < 1e-12
    assert float((found["k3"] - wanted).norm() / wanted.norm()) > 1e-2


def test_corrections_of_the_sampler():
    """Row 0 was sampled at half, a third and the same of the old probability; row 1 at twice and the same."""
    shift = [[math.log(2), math.log(3), 0.0], [-math.log(2), 0.0, 5.0]]
    sampler = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(OLD, shift, strict=True)]
    expected = {
        "token_truncate": [[2.0, 2.5, 1.0], [0.5, 1.0]],
        "token_mask": [[2.0, 0.0, 1.0], [0.5, 1.0]],
        "sequence_truncate": [[2.5] * 3, [0.5] * 2],
        "sequence_mask": [[0.0] * 3, [0.5] * 2],
        "none": [[1.0] * 3, [1.0] * 2],
    }
    for way, weights in expected.items():
        cfg = Config(surrogate="reinforce", sampler_correction=way, max_importance_weight=2.5)
        _, gradient = loss_and_gradient(cfg, inputs(sampler=sampler), trust_sampler=False)
        assert gradient == rows([[-w for w in weights[0]], [2 * w for w in weights[1]]]), way


OFF = [[-1.0, -0.5, -2.0], [0.3, -2.5, 9.0]]  # row 1: 0.5 above NEW for each of its two trained tokens


def test_rows_far_from_the_sampler_have_no_surrogate():
    """Only with a negative advantage; the NaN behind row 1 is no part of its mean, and its KL stays."""
    reference = [[-1.0, -0.5, -2.0], [-1.2, -2.0, 0.0]]
    kl = [math.exp(x) - x - 1 for x in (-1.0, 1.0)]
    for gains, threshold, kept in (
        ((1.0, -2.0), 0.49, False),
        ((1.0, -2.0), 0.51, True),
        ((1.0, 2.0), 0.49, True),
        ((1.0, 0.0), 0.49, True),
    ):
        cfg = Config(surrogate="reinforce", off_policy_threshold=threshold, beta=0.1)
        given = inputs(gains=gains, sampler=OFF, reference=reference)
        loss, measured = policy_loss(given, torch.ones(2, 3), cfg, SURROGATES["reinforce"], trust_sampler=True)
        [gradient] = torch.autograd.grad(loss.sum(), given.logprobs)
        surrogate = [-gains[1] * x if kept else 0.0 for x in NEW[1][:2]]
        assert loss[1].tolist() == pytest.approx([surrogate[0] + 0.1 * kl[0], surrogate[1] + 0.1 * kl[1], 0.0])
        assert loss[0].tolist() == pytest.approx([1.0, 0.5, 2.0]) and gradient[0].tolist() == [-1.0] * 3
        slopes = [-gains[1] * kept + 0.1 * (1 - math.exp(x)) for x in (-1.0, 1.0)]
        assert gradient[1].tolist() == pytest.approx([*slopes, 0.0])
        off = torch.where(given.trained, measured.means["clip/off_policy"], False)
        assert float(off.sum() / given.trained.sum()) == pytest.approx(0.0 if kept else 0.4)


def test_the_mask_of_rows_follows_the_policy_within_a_step():
    """The sampler is compared with the policy of the update, not with the old one."""
    cfg = Config(surrogate="reinforce", off_policy_threshold=0.2)
    given = inputs(gains=(-1.0, -1.0))  # sampled by OLD: 0.1/3 below NEW in row 0, 0.15 above in row 1
    _, before = policy_loss(given, torch.ones(2, 3), cfg, SURROGATES["reinforce"], trust_sampler=True)
    assert not before.means["clip/off_policy"].any()
    moved = dataclasses.replace(given, logprobs=given.logprobs - 0.1)
    _, after = policy_loss(moved, torch.ones(2, 3), cfg, SURROGATES["reinforce"], trust_sampler=True)
    assert after.means["clip/off_policy"][:, 0].tolist() == [False, True]


def test_the_sample_size_and_the_gaps_of_a_sampler():
    """Sums over two micro-batches of different size, and the NaN behind row 1 in neither."""
    gaps = [[2.0, -0.0005, 0.05], [-0.5, 0.005, math.nan]]
    sampler = [[new - gap for new, gap in zip(*pair, strict=True)] for pair in zip(NEW, gaps, strict=True)]
    tally = Tally()
    for rows_of in ([0, 1], [0]):
        whole = inputs(old=NEW, sampler=sampler)
        given = LossInputs(*(None if part is None else part[rows_of] for part in vars(whole).values()))
        loss, measured = policy_loss(given, torch.ones(len(rows_of), 3), Config(), weights_unchanged=True)
        tally.micro_batch(loss.sum(), measured.means, {}, given.trained)
    known = [*gaps[0], *gaps[1][:2], *gaps[0]]
    weights = np.exp(known)
    metrics = with_sample_size(tally.reduce(start()).metrics)
    assert metrics["sampler/ess"] == pytest.approx(weights.sum() ** 2 / (8 * (weights**2).sum()), rel=1e-6)
    assert 0.3 < metrics["sampler/ess"] < 0.7
    names = ("below_0.001", "below_0.01", "below_0.1", "below_1", "above_1")
    assert [8 * metrics[f"sampler/gap_{name}"] for name in names] == [2, 1, 2, 1, 2]
    for how in ({"trust_sampler": True, "weights_unchanged": True}, {"weights_unchanged": False}):
        _, measured = policy_loss(inputs(), torch.ones(2, 3), Config(), **how)
        assert not {name for name in measured.means if name.startswith("sampler/")}


# --- advantages


REWARDS = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, np.nan, 1.0]])


def test_leave_one_out_compares_with_the_others():
    found = advantages_from("leave_one_out", "none", REWARDS)
    assert found[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert found[1].tolist() == [0.0] * 4 and found[2].tolist() == pytest.approx([2.0, -1.0, 0.0, -1.0])


def test_the_batch_as_baseline_and_scale():
    known = REWARDS[~np.isnan(REWARDS)]
    found = advantages_from("batch", "batch", REWARDS)
    expected = np.where(np.isnan(REWARDS), 0.0, (REWARDS - known.mean()) / known.std(ddof=1))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[1].any(), "a group of equal rewards is compared with the others"
    scaled = advantages_from("group", "batch", REWARDS)
    np.testing.assert_allclose(scaled[0], (REWARDS[0] - 0.25) / known.std(ddof=1), atol=1e-6)
    assert not scaled[1].any()
    assert not advantages_from("batch", "batch", np.full((2, 3), 0.1)).any()


def table_of(scores, weights, group):
    facts = {name: np.zeros(len(scores)) for name in FACTS}
    return Table(["a", "b"], scores, scores @ np.array(weights), facts, group, reward_weights=tuple(weights))


def test_each_reward_is_normalized_before_the_sum():
    """GDPO: a reward of small spread weighs as much as one of large spread."""
    scores = np.array([[100.0, 0.1], [0.0, 0.2], [50.0, 0.3], [10.0, 0.9], [10.0, 0.2], [10.0, 0.1]])
    cfg = Config(num_generations=3, normalize_each_reward=True, baseline="batch", scale_rewards="batch")
    found = advantages_of(table_of(scores, (1.0, 2.0), 3), cfg)
    parts = scores.reshape(2, 3, 2)
    std = parts.std(1, ddof=1, keepdims=True)
    each = np.where(std > 0, (parts - parts.mean(1, keepdims=True)) / np.where(std > 0, std, 1), 0)
    total = (each @ [1.0, 2.0]).ravel()
    np.testing.assert_allclose(found, (total - total.mean()) / total.std(ddof=1), atol=1e-5)
    plain = advantages_of(table_of(scores, (1.0, 2.0), 3), dataclasses.replace(cfg, normalize_each_reward=False))
    assert np.abs(found - plain).max() > 0.1
    unknown = np.array([[[1.0, np.nan], [3.0, np.nan]]])
    first, second = normalize_each(unknown)[0]
    assert first[0] == -second[0] == pytest.approx(-(0.5**0.5)) and np.isnan([first[1], second[1]]).all()


def test_a_completion_without_loss_is_still_context():
    cut = Completion(0, np.array([5, 6], np.int32), np.zeros(2, np.float32), "length")
    assert not cut.without_loss().trained.any() and cut.trained.all() and cut.without_loss().token_ids is cut.token_ids


# --- what makes no sense


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"surrogate": "cispo", "clip_ratio_max": 3.0}, "clip_ratio_max: it acts with surrogate ppo_clip, got 3.0"),
        ({"clip_ratio_max": 1.2}, "clip_ratio_max: must be above 1 [+] clip_eps_high, 1.2"),
        ({"surrogate": "sapo", "clip_eps": 0.1}, "clip_eps: it acts with surrogate ppo_clip or cispo"),
        ({"surrogate": "reinforce", "ratio": "sequence"}, "ratio: it acts with surrogate ppo_clip or cispo or sapo"),
        ({"surrogate": "my.py:f", "ratio": "sequence"}, "ratio: it acts with surrogate"),
        ({"sapo_temperature": 2.0}, "sapo_temperature: it acts with surrogate sapo"),
        ({"surrogate": "sapo", "sapo_temperature_negative": 0.0}, "sapo_temperature_negative: must be a finite number"),
        ({"kl_estimator": "k2"}, "kl_estimator: k2 needs beta > 0"),
        (
            {"kl_estimator": "k3_weighted", "beta": 0.1, "surrogate": "reinforce"},
            "k3_weighted is weighted by the ratio",
        ),
        ({"sampler_correction": "token_mask", "max_importance_weight": 1.0}, "max_importance_weight: must be above 1"),
        ({"off_policy_threshold": 0.0}, "off_policy_threshold: must be a finite number > 0, or null, got 0.0"),
        ({"weighting": "dr_grpo", "scale_rewards": "batch"}, "scale_rewards: weighting dr_grpo implies none"),
    ],
)
def test_settings_without_effect_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        check(Config(**NEEDED, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"surrogate": "cispo", "clip_eps_high": 4.0, "weighting": "dapo"},
        {"ratio": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4},
        {"surrogate": "my.py:f", "clip_eps": 0.1},
        {"clip_ratio_max": 3.0, "truncated": "mask", "baseline": "leave_one_out", "scale_rewards": "none"},
        {"kl_estimator": "k3_weighted", "beta": 0.1, "sampler_correction": "sequence_mask"},
    ],
)
def test_settings_that_go_together(settings):
    check(Config(**NEEDED, **settings))
