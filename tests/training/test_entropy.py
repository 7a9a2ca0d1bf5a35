"""Entropy of tokens by hand: values and gradients, the bonus, its adaptive coefficient, tokens of high entropy.

In this file the engine records no entropies, but in the cases named so; test_recorded_entropy.py has the other way.
The part on several ranks has one launch for each number of ranks; its rollouts are those of test_invariance.py.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from grpo.checkpoints import resume
from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from grpo.forward.fused_head import HeadLogprobs
from grpo.forward.logprobs import Scorer, bounded_logits
from grpo.forward.token_entropy import entropy_of
from grpo.runtime.distributed import World
from grpo.training import entropy as entropy_module
from grpo.training.entropy import adapt, coefficient
from grpo.training.exchange import deliver
from grpo.training.losses import LossInputs, policy_loss
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.types import Counters
from tests.checkpoints.test_checkpoint import save
from tests.forward.test_logprobs import VOCAB, micro_batch
from tests.support.launcher import run_ranks
from tests.support.rank_jobs import config, injected, injected_step, make_policy, table_of, weights_sha256
from tests.support.tiny import tiny_model
from tests.training.test_invariance import ZERO, distance, flat, load_file

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
NEEDED = dict(model="m", data="d", rewards={"mark_reward": 1.0})


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(entropy_module, "records_entropy", lambda cfg: False)


def apart(a, b):
    return float((a - b).norm() / b.norm())


# --- values and gradients


def test_entropy_and_its_gradient_by_hand():
    """Of two equal tokens log 2; of (1/2, 1/4, 1/4) 1.5 log 2, with gradient -p (log p + H)."""
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    found = entropy_of(logits)
    assert found.tolist() == pytest.approx([1.5 * math.log(2), math.log(2)], abs=1e-15)
    [gradient] = torch.autograd.grad(found[0], logits)
    half, quarter = (-p * (math.log(p) + 1.5 * math.log(2)) for p in (0.5, 0.25))
    assert gradient.tolist() == [pytest.approx([half, quarter, quarter, 0.0], abs=1e-15), [0.0] * 4]
    assert torch.autograd.gradcheck(entropy_of, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("block_rows", [8, 64])
@pytest.mark.parametrize("scale, temperature, clamp, spread", [(1.0, 1.0, 100.0, 1.0), (0.5, 0.7, 2.0, 3.0)])
def test_the_fused_head_equals_autograd_in_float64(scale, temperature, clamp, spread, block_rows):
    """Clamp, temperature, several blocks; both outputs pull on hidden states and weight. Control: temperature x 1.5."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), spread * torch.randn(300, 16, generator=generator)
    targets = torch.randint(0, 300, (37,), generator=generator)
    pull, push = torch.randn(2, 37, generator=generator)

    def values(logprobs, entropy, leaves):
        loss = (logprobs * pull + entropy * push).sum()
        return entropy.detach().double(), *(grad.double() for grad in torch.autograd.grad(loss, leaves))

    def naive(temperature):
        leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
        bounded, moved = bounded_logits(leaves[0] @ leaves[1].t() * scale, temperature, clamp)
        assert bool(moved.any()) == (clamp == 2.0)
        logprobs = bounded.log_softmax(-1)
        return values(logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1), leaves)

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    how = (scale, temperature, clamp, block_rows, len(weight))
    logprobs, _, entropy = HeadLogprobs.apply(*leaves, targets, *how, True)
    for ours, theirs, wrong in zip(
        values(logprobs, entropy, leaves), naive(temperature), naive(1.5 * temperature), strict=True
    ):
        assert apart(ours, theirs) < 2e-6
        assert apart(wrong, theirs) > 1e-2
    plain, _, nothing = HeadLogprobs.apply(*leaves, targets, *how)
    assert plain.equal(logprobs) and len(nothing) == 0


@pytest.mark.parametrize("support", [False, True], ids=["whole vocabulary", "support"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_every_path_of_the_scorer_measures_the_same(architecture, support, monkeypatch):
    """Fused head, blocks through autograd, the model's own logits; against all logits at once. 4 tokens a block."""
    monkeypatch.setattr("grpo.forward.logprobs.BLOCK_ELEMENTS_PER_MB", VOCAB * 4)
    model, micro = tiny_model(architecture, spread=2.0), micro_batch(support)
    push = torch.randn(micro.trained.shape, generator=torch.Generator().manual_seed(1))
    cfg = Config(temperature=0.7, logits_chunk_mb=1)

    def gradient(entropy):
        model.zero_grad()
        (entropy * push * micro.trained).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def naive(temperature):
        rows = torch.arange(len(micro.rows))[:, None]
        logits = model(input_ids=micro.input_ids).logits[rows, micro.positions] / temperature
        if support:
            kept = micro.support.clamp(min=0)
            logits = logits.gather(-1, kept).masked_fill(micro.support < 0, -1e30)
        logprobs = logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1) * micro.trained

    scorer = Scorer(model, cfg)
    scorer(micro)
    assert scorer.entropy is None, "nobody asked for it"
    scorer.measures_entropy = True
    scorer(micro)
    scorer.measures_entropy = False  # before the backward, which computes blocks again
    torch.testing.assert_close(scorer.entropy, naive(0.7), rtol=1e-5, atol=1e-5)
    ours = gradient(scorer.entropy)
    assert apart(ours, gradient(naive(0.7))) < 1e-5
    assert apart(gradient(naive(0.8)), ours) > 1e-2
    scorer.head.usable, scorer.measures_entropy = False, True
    scorer(micro)
    assert apart(gradient(scorer.entropy), ours) < 1e-5


# --- bonus and choice


def annotated(masked=False, **settings):
    """A policy and the annotated minibatches of an injected step."""
    cfg = config(**settings)
    policy = make_policy(cfg, ALONE)
    prompts, completions, advantages = injected(cfg, 0, masked=masked)
    lengths, trained = (
        np.array([f(c) for c in completions]) for f in (lambda c: len(c.trained), lambda c: sum(c.trained))
    )
    plan = make_plan(cfg, prompts, lengths, advantages, 1, num_trained=trained)
    table = table_of(cfg, lengths, np.zeros(len(lengths)), trained)
    batches = deliver(ALONE, cfg, plan, prompts, completions, table, advantages)
    return policy, policy.annotate(batches), trained, plan


def gradient_of(policy, minibatch):
    parameters = list(policy.model.parameters())
    total = 0.0
    for micro in minibatch:
        loss = policy.loss(micro, Tally(), weights_unchanged=False)
        total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return total


def test_the_bonus_is_a_mean_over_the_tokens_of_a_minibatch():
    """Rows of advantage 0 count; the denominator is the same in each of several micro-batches."""
    _, batches, trained, plan = annotated(masked=True, entropy_coef=0.1, num_minibatches=2)
    for minibatch, part in zip(batches, plan, strict=True):
        assert len(minibatch) > 1
        number = sum(trained[n] for n in part.rows)
        for micro in minibatch:
            assert micro.entropy_weights.equal(micro.trained / number) and micro.chosen is micro.entropy is None
        assert sum(float(micro.entropy_weights.sum()) for micro in minibatch) == pytest.approx(1)
        gains = torch.cat([micro.advantages for micro in minibatch])
        assert (gains == 0).any()


@pytest.mark.parametrize("weighting", ["grpo", "dr_grpo"])
def test_the_bonus_does_not_depend_on_the_weighting(weighting):
    """What it adds to the gradient is that of minus the coefficient times the mean entropy, computed alone."""
    added = []
    for coef in (0.0, 0.25):
        policy, [minibatch], _, _ = annotated(entropy_coef=coef, entropy_target=None, weighting=weighting, beta=0.01)
        added.append(gradient_of(policy, minibatch))
    mean = torch.cat([naive_entropy(policy, micro) for micro in minibatch]).mean()
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(-0.25 * mean, list(policy.model.parameters()))])
    assert apart(added[1] - added[0], alone) < 1e-4


def naive_entropy(policy, micro):
    """[M] of the trained tokens, from all logits."""
    rows = torch.arange(len(micro.rows))[:, None]
    logprobs = policy.model(input_ids=micro.input_ids).logits[rows, micro.positions].log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)[micro.trained]


def test_tokens_are_chosen_by_one_threshold_of_the_minibatch():
    policy, batches, _, _ = annotated(masked=True, top_entropy_share=0.3, entropy_coef=0.1, num_minibatches=2)
    other = 0
    for minibatch in batches:
        assert len(minibatch) > 1
        values = torch.cat([naive_entropy(policy, micro).detach() for micro in minibatch])
        threshold = values[values >= torch.quantile(values, 0.7)].min() - 1e-5
        chosen = torch.cat([micro.chosen[micro.trained] for micro in minibatch])
        assert chosen.equal(values >= threshold) and float(chosen.float().mean()) == pytest.approx(0.3, abs=0.05)
        for micro in minibatch:
            assert not (micro.chosen & ~micro.trained).any()
            assert micro.entropy_weights.equal(micro.chosen / chosen.sum())
            own = naive_entropy(policy, micro).detach()
            other += int((micro.chosen[micro.trained] != (own >= torch.quantile(own, 0.7))).sum())
    assert other > 0, "a threshold for each micro-batch would choose the same: the test shows nothing"


def test_only_chosen_tokens_have_a_surrogate_and_all_a_kl():
    new = torch.tensor([[-1.0, -0.5, math.nan]], requires_grad=True)
    old, trained = new.detach(), torch.tensor([[True, True, False]])
    one = LossInputs(new, old, old - 0.3, old, torch.ones(1), trained, torch.tensor([[True, False, False]]))
    for beta in (0.0, 0.5):
        loss, _ = policy_loss(one, torch.ones(1, 3), Config(beta=beta), trust_sampler=True)
        [gradient] = torch.autograd.grad(loss.sum(), new)
        pull = beta * (1 - math.exp(-0.3))
        assert gradient[0, :2].tolist() == pytest.approx([pull - 1, pull])


@pytest.mark.parametrize(
    ("settings", "before", "measured"),
    [
        ({"num_iterations": 2, "top_entropy_share": 0.5}, 1, 1),
        ({"top_entropy_share": 0.5}, 1, 1),
        ({"num_iterations": 2, "entropy_coef": 0.1}, 1, 0),
        ({"entropy_coef": 0.1}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_no_forward_that_is_not_needed(settings, before, measured, monkeypatch):
    """Forwards of a micro-batch before the updates, and those of them that measure entropies."""
    seen = []
    true_forward = Scorer.forward
    monkeypatch.setattr(
        Scorer, "forward", lambda self, micro: (seen.append(self.measures_entropy), true_forward(self, micro))[1]
    )
    policy, [minibatch], _, _ = annotated(**settings)
    assert len(seen) == before * len(minibatch) and sum(seen) == measured * len(minibatch)
    assert all((micro.old_logprobs is not None) == ("num_iterations" in settings) for micro in minibatch)
    seen.clear()
    policy.loss(minibatch[0], Tally(), False)
    assert seen == [settings.get("entropy_coef", 0) > 0] and policy.scorer.entropy is None


# --- the adaptive coefficient


def test_the_coefficient_follows_the_target():
    """It rises where the entropy is at most the target, and acts in the update after; in the first it never does."""
    cfg = Config(entropy_target=1.0, entropy_coef=0.1, entropy_coef_step=0.04, entropy_coef_max=0.2)
    counters, found = Counters(), []
    for entropy in (2.0, 1.0, 0.5, 0.5, 0.5, 1.5, 1.5, 9.0, 9.0, 9.0, 9.0, 0.1):
        found.append(coefficient(cfg, counters))
        adapt(cfg, counters, entropy)
    expected = [0.0, 0.0, 0.10, 0.14, 0.18, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert found == pytest.approx(expected, abs=1e-12)
    assert counters.entropy_coef == pytest.approx(0.04) and counters.last_entropy == 0.1
    assert coefficient(Config(entropy_coef=0.3), Counters()) == 0.3


ADAPTIVE = {"entropy_target": 5.0, "entropy_coef_step": 0.05, "entropy_coef": 0.1}


def test_an_update_measures_the_mean_over_its_tokens_and_a_skipped_one_changes_nothing():
    for share in (1.0, 0.4):
        policy, [minibatch], _, _ = annotated(**ADAPTIVE, top_entropy_share=share)
        values = torch.cat(
            [
                naive_entropy(policy, m).detach()[(m.trained if m.chosen is None else m.chosen)[m.trained]]
                for m in minibatch
            ]
        )
        start = make_policy(config(), ALONE)  # the same weights
        tally = Tally()
        policy.train_on([minibatch], tally, 9, False, on_skip=lambda *_: None)
        assert policy.counters.last_entropy == pytest.approx(float(values.mean()), rel=1e-5)
        metrics = tally.reduce(ALONE).metrics
        every = torch.cat([naive_entropy(start, m).detach() for m in minibatch])
        assert metrics["entropy/coef"] == 0 and metrics["entropy/true"] == pytest.approx(float(every.mean()), rel=1e-5)
        assert ("entropy/chosen" in metrics) == (share < 1)
        before = dataclasses.replace(policy.counters)
        true_loss = policy.loss
        policy.loss = lambda *args: true_loss(*args) * math.nan  # noqa: B023
        policy.train_on([minibatch], Tally(), 9, False, on_skip=lambda *_: None)
        assert policy.counters.skipped_updates == 1
        assert dataclasses.replace(policy.counters, skipped_updates=0, consecutive_skips=0) == before


def test_resuming_continues_with_the_same_coefficient(tmp_path):
    """Bit-equal weights. Control: a resume that forgets the last entropy applies no bonus and ends elsewhere."""
    cfg = config(**ADAPTIVE, temperature=0.2)

    def steps(policy, numbers):
        for step in numbers:
            injected_step(cfg, ALONE, policy, step, 4, 0, Tally())
        return weights_sha256(policy)

    whole = make_policy(cfg, ALONE)
    steps(whole, range(2))
    assert whole.counters.last_entropy <= 5.0 and whole.counters.entropy_coef == pytest.approx(0.2)
    assert save(tmp_path, 2, whole, Recipe(), cfg, {}) is None
    end = steps(whole, range(2, 4))
    ends = {}
    for forgets in (False, True):
        again = make_policy(cfg, ALONE)
        again.model.load_state_dict(load_file(tmp_path / "checkpoint_2" / "model.safetensors"), strict=False)
        resume.restore(again, tmp_path / "checkpoint_2")
        if forgets:
            again.counters.last_entropy = None
        ends[forgets] = steps(again, range(2, 4)), again.counters
    assert ends[False] == (end, whole.counters) and ends[True][0] != end


@pytest.mark.parametrize(("value", "fine"), [(None, True), (0.5, True), (-0.1, False), ("0.5", False), (True, False)])
@pytest.mark.parametrize("name", ["entropy_coef", "last_entropy"])
def test_a_checkpoint_with_a_wrong_state_is_refused(tmp_path, name, value, fine):
    (tmp_path / "trainer").mkdir()
    state = {"counters": dataclasses.asdict(Counters()) | {name: value}, "config": {}}
    (tmp_path / "trainer" / "state.json").write_text(json.dumps(state))
    if fine:
        assert getattr(resume.read_state(tmp_path)["counters"], name) == value
    else:
        with pytest.raises(UserError, match=f"counters: {name} must be a finite number >= 0 or null"):
            resume.read_state(tmp_path)


# --- several ranks


SHARP = {"temperature": 0.2}  # else the tiny model's tokens are nearly equally likely
RECORDED = {"top_entropy_share": 0.3, "entropy_coef": 0.3, **SHARP}
SHARE = {**RECORDED, "scored": True}
ADAPTED = {"entropy_target": 4.95, "entropy_coef": 0.2, "entropy_coef_step": 0.1, "weighting": "dapo", **SHARP}
CASES = {
    "share": SHARE,
    "adaptive": ADAPTED,
    "two passes": {**SHARE, "num_iterations": 2, "num_minibatches": 2, "steps": 5, "beta": 0.04},
    "deterministic": {**SHARE, "deterministic": True},
    "recorded": RECORDED,
    "recorded alone": {"top_entropy_share": 0.3, **SHARP},
    "deterministic, recorded": {**RECORDED, "deterministic": True, "num_minibatches": 2},
}
OF_ONE = {
    "no share": {"entropy_coef": 0.3, **SHARP},
    "no bonus": {"top_entropy_share": 0.3, "scored": True, **SHARP},
    "plain": {"weighting": "dapo", **SHARP},
}
OF_TWO = {
    "share, cut": {**SHARE, "micro_batch_tokens": 1},
    "adaptive, cut": {**ADAPTED, "micro_batch_tokens": 1},
    "adaptive, crowded": {**ADAPTED, "where": "backward"},  # on rank 1 memory runs out, and updates begin again
    "recorded, cut": {**RECORDED, "micro_batch_tokens": 1},
    "share, zero2": {**SHARE, **ZERO["zero2"]},
    "recorded alone, zero3": {"top_entropy_share": 0.3, **SHARP, **ZERO["zero3"]},
    "adaptive, zero3": {**ADAPTED, **ZERO["zero3"]},
}
OF_THREE = {"recorded": RECORDED, "deterministic, recorded": CASES["deterministic, recorded"]}
FREE = {"architecture": "qwen3", "deterministic": True, "steps": 5, "top_entropy_share": 0.3, **SHARP}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """ends[W][name]: what rank 0 reported, and the final weights; of "free" rank 0's report alone."""
    found = {}
    for size, cases in ((1, CASES | OF_ONE), (2, CASES | OF_TWO), (3, OF_THREE)):
        out = tmp_path_factory.mktemp(f"ranks{size}")
        jobs = [
            ("crowded_updates" if "where" in how else "injected_updates", {"name": name, **how})
            for name, how in cases.items()
        ] + [("architecture_steps", FREE), ("architecture_steps", {**FREE, "top_entropy_share": 1.0})]
        ranks = run_ranks(jobs, size, out, timeout=240)
        assert all(len({rank[i]["sha256"] for rank in ranks}) == 1 for i in range(len(jobs)))
        found[size] = {
            name: (ranks[0][i], flat(load_file(out / f"{name}.safetensors"))) for i, name in enumerate(cases)
        } | {"free": (ranks[0][-2], None), "free, all": (ranks[0][-1], None)}
    return found


@pytest.mark.parametrize(("size", "name"), [(2, name) for name in [*CASES, *OF_TWO]] + [(3, name) for name in OF_THREE])
def test_neither_ranks_nor_micro_batches_matter(ends, size, name):
    """20 updates end within 1e-3 of the distance travelled; without the mask or the bonus above 1e-2."""
    alone, several = ends[1][name if name in CASES else name.split(",")[0]], ends[size][name]
    assert distance(alone[1], several[1]) < 1e-3
    keys = [key for key in alone[0]["metrics"] if key.startswith("entropy/")]
    assert len(keys) == (2 if "adaptive" in name else 1 if "alone" in name else 3)
    measured = [{key: end[0]["metrics"][key] for key in keys} for end in (alone, several)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-3)
    controls = {"share": ("no share", "no bonus"), "adaptive": ("plain",), "recorded": ("no share", "recorded alone")}
    for other in controls.get(name, ()):
        assert distance(alone[1], ends[1][other][1]) > 1e-2, other
    if name == "adaptive":
        assert 0 < measured[0]["entropy/coef"] < 1
    if "deterministic" in name:
        assert alone[0]["sha256"] == several[0]["sha256"]


@pytest.mark.parametrize("size", [2, 3])
def test_free_running_steps_choose_the_same_tokens_for_any_number_of_ranks(ends, size):
    """Entropies recorded by the engine, bit-identical weights. Control: a run without the choice ends elsewhere."""
    alone, several = (ends[count]["free"][0] for count in (1, size))
    assert alone["sha256"] == several["sha256"] != ends[size]["free, all"][0]["sha256"]
    assert all(alone["sampled"][key] == ids for key, ids in several["sampled"].items()) and several["sampled"]
    assert 0.2 < alone["metrics"]["entropy/chosen"] < 0.5


# --- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"entropy_coef": -0.1}, "entropy_coef: must be a finite number >= 0, got -0.1"),
        ({"top_entropy_share": 0.0}, r"top_entropy_share: must be in \(0, 1\], got 0.0"),
        ({"top_entropy_share": 1.1}, r"top_entropy_share: must be in \(0, 1\], got 1.1"),
        ({"entropy_target": 0.0}, "entropy_target: must be a finite number of nats > 0, or null, got 0.0"),
        ({"entropy_target": math.inf}, "entropy_target: must be a finite number of nats > 0, or null, got inf"),
        ({"entropy_coef_step": 0.1}, "entropy_coef_step: it needs entropy_target, got 0.1 without. Leave it out"),
        ({"entropy_coef_max": 2.0}, "entropy_coef_max: it needs entropy_target, got 2.0 without. Leave it out"),
        ({"entropy_coef_max": 0.0, "entropy_target": 1.0}, "entropy_coef_max: must be a finite number > 0, got 0.0"),
        ({"entropy_coef": 2.0, "entropy_target": 1.0}, "entropy_coef: must be at most entropy_coef_max 1, got 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        check(Config(**NEEDED, **settings))


def test_settings_that_go_together():
    check(Config(**NEEDED, entropy_target=0.5, entropy_coef_step=0.01, top_entropy_share=0.2, surrogate="reinforce"))
    check(Config(**NEEDED, entropy_coef=0.01, ratio="sequence"))
    assert not entropy_module.needs_every_row(Config())
