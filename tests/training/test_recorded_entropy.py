"""Entropies that the engine records: of the distribution that training scores, and the choice of tokens by them."""

import dataclasses

import numpy as np
import pytest
import torch

from grpo.forward.logprobs import Scorer, bounded_logits
from grpo.forward.token_entropy import entropy_of
from grpo.rollout import rollout
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling, draw
from grpo.runtime.distributed import World
from grpo.training import entropy as entropy_module
from grpo.training.entropy import choose_recorded, lowest_chosen
from grpo.training.exchange import deliver
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from tests.support.rank_jobs import config, injected, make_policy, table_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SHARE = {"top_entropy_share": 0.3, "temperature": 0.7}


# --- recorded


@pytest.mark.parametrize("vocab", [40, 1300])  # the sum in one part, and in blocks
@pytest.mark.parametrize("truncated", [{}, {"top_p": 0.8, "max_support": 30}, {"top_k": 5}])
@pytest.mark.parametrize("temperature, clamps", [(1.0, False), (0.6, True)])
def test_a_draw_records_the_entropy_of_its_distribution(vocab, truncated, temperature, clamps):
    """Temperature, clamp, support; what is drawn is the same bits as without. Control: another temperature."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(50, vocab, generator=generator)
    uniforms = torch.rand(50, dtype=torch.float64, generator=generator)
    clamp = 0.45 * float((logits.amax(-1) - logits.amin(-1)).max()) if clamps else 100.0  # acts on the widest rows
    sampling = Sampling(temperature, logit_clamp=clamp, **truncated)
    drawn, plain = (draw(logits, uniforms, dataclasses.replace(sampling, records_entropy=on)) for on in (True, False))
    assert plain.entropy is None and drawn.entropy.dtype == torch.float32
    assert drawn.token_ids.equal(plain.token_ids) and drawn.logprobs.equal(plain.logprobs)

    def expected(temperature):
        bounded, moved = bounded_logits(logits.double(), temperature, clamp)
        assert bool(moved.any()) == clamps
        if drawn.support is not None:
            inside = bounded.gather(-1, drawn.support.clamp(min=0))
            bounded = inside.masked_fill(drawn.support < 0, -torch.inf)
        return entropy_of(bounded)

    assert float((drawn.entropy - expected(temperature)).abs().max()) < 2e-6
    assert float((drawn.entropy - expected(1.5 * temperature)).abs().max()) > 1e-2


def test_a_certain_choice_has_no_entropy():
    drawn = draw(torch.tensor([[0.0, 500.0, 0.0]]), torch.tensor([0.5]).double(), Sampling(records_entropy=True))
    assert 0.0 <= drawn.entropy.item() < 1e-6


def sampled(**settings):
    """A policy, what its engine sampled, and the plan and table of the step; rewards differ but in group 1."""
    cfg = config(**SHARE | settings)
    policy = make_policy(cfg, ALONE, settings.get("model", "qwen3"))
    prompts, _, advantages = injected(cfg, 0)
    engine = NativeEngine(policy.model, [0, 9], cfg.max_generate_length, seed=cfg.seed)
    completions = rollout(engine, prompts, range(100), cfg, ALONE)
    advantages[3:6] = 0.0
    lengths = np.array([len(completion.token_ids) for completion in completions])
    table = table_of(cfg, lengths, np.zeros(len(lengths)), np.array([sum(c.trained) for c in completions]))
    plan = make_plan(cfg, prompts, lengths, advantages, 1, num_trained=table.num_trained)
    return cfg, policy, completions, plan, deliver(ALONE, cfg, plan, prompts, completions, table, advantages)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "max_support": 40}, {"model": "gemma2"}, {"model": "gpt2"}])
def test_what_the_engine_records_is_what_training_would_measure(settings):
    """On the simple cache and the shared one, with and without a support. Control: entropies of the next token."""
    cfg, policy, completions, _, batches = sampled(**settings)
    of_row = {completion.row: completion.entropy for completion in completions}
    scorer = Scorer(policy.model, cfg)
    scorer.measures_entropy = True
    apart, control, tokens = 0.0, 0.0, 0
    for micro in batches[0]:
        scorer(micro)
        for b, row in enumerate(micro.rows):
            measured, recorded = scorer.entropy[b, : len(of_row[row])].detach().numpy(), of_row[row]
            apart = max(apart, float(np.abs(recorded - measured).max(initial=0.0)))
            control = max(control, float(np.abs(recorded[1:] - measured[:-1]).max(initial=0.0)))
            tokens += len(recorded)
    assert tokens > 50 and apart < 1e-5 and control > 1e-2


def test_only_the_setting_that_reads_them_records_entropies():
    for settings in ({"top_entropy_share": 1.0}, {"top_entropy_share": 1.0, "entropy_coef": 0.1}):
        _, _, completions, _, _ = sampled(**settings)
        assert all(completion.entropy is None for completion in completions)


# --- chosen


def test_both_ways_choose_the_same_tokens(monkeypatch):
    """By what the engine recorded, and by what a forward measures; with rows of advantage 0, which only the second way
    computes. Control: a quantile of the computed rows alone."""
    found = {}
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(entropy_module, "records_entropy", lambda cfg: False)
        _, policy, completions, plan, batches = sampled(num_minibatches=2)
        batches = policy.annotate(batches)
        chosen = {
            row: micro.chosen[b, : int(micro.lengths[b])].tolist()
            for minibatch in batches
            for micro in minibatch
            for b, row in enumerate(micro.rows)
        }
        found[recorded] = chosen, completions, plan
    (chosen, completions, plan), (measured, _, _) = found[True], found[False]
    assert {3, 4, 5} <= measured.keys() and not {3, 4, 5} & chosen.keys()
    assert {row: measured[row] for row in chosen} == chosen and len(chosen) > 5
    of_row = {completion.row: completion.entropy for completion in completions}
    other = 0
    for minibatch in plan:
        computed = [row for row in minibatch.rows if row in chosen]
        threshold = lowest_chosen(np.concatenate([of_row[row] for row in computed]).astype(float), 0.3)
        other += sum(chosen[row] != (of_row[row].astype(float) >= threshold).tolist() for row in computed)
    assert other > 0


def test_one_threshold_for_a_minibatch_over_its_trained_tokens():
    cfg = config(**SHARE, num_minibatches=2)
    prompts, completions, advantages = injected(cfg, 0, masked=True)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    trained = np.array([int(completion.trained.sum()) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, 1, num_trained=trained)
    table = table_of(cfg, lengths, np.zeros(len(lengths)), trained)
    chosen = choose_recorded(ALONE, cfg, [minibatch.rows for minibatch in plan], completions, table)
    assert chosen.keys() == set(range(len(completions)))
    for minibatch in plan:
        rows = [completions[n] for n in minibatch.rows]
        values = np.concatenate([one.entropy[one.trained] for one in rows]).astype(np.float64)
        threshold = values[values >= np.quantile(values, 0.7)].min() - 1e-5
        for one in rows:
            assert chosen[one.row].tolist() == (one.trained & (one.entropy >= threshold)).tolist()


def test_equal_entropies_are_chosen_together():
    """Values within 1e-5 nats of the lowest one that is chosen, whatever their last bits are."""
    cfg = config(**SHARE)
    _, completions, _ = injected(cfg, 0)
    completions = completions[:3]
    for one, entropies in zip(
        completions, ([1.0, 2.0, 3.0], [2.0 - 4e-6, 0.5, 0.1], [2.0 + 4e-6, 0.3, 0.2]), strict=True
    ):
        object.__setattr__(one, "entropy", np.array(entropies, np.float32))
        object.__setattr__(one, "token_ids", np.zeros(3, np.int32))
        object.__setattr__(one, "trained", np.ones(3, bool))
    table = table_of(cfg, np.full(3, 3), np.zeros(3))
    chosen = choose_recorded(ALONE, cfg, [[0, 1, 2]], completions, table)
    assert [chosen[n].tolist() for n in range(3)] == [[False, True, True], [True, False, False], [True, False, False]]


@pytest.mark.parametrize(("settings", "before"), [({}, 0), ({"num_iterations": 2}, 1), ({"entropy_coef": 0.1}, 0)])
def test_no_forward_before_the_updates_but_for_old_log_probs(settings, before, monkeypatch):
    seen = []
    forward = Scorer.forward
    monkeypatch.setattr(
        Scorer, "forward", lambda self, micro: (seen.append(self.measures_entropy), forward(self, micro))[1]
    )
    _, policy, _, plan, batches = sampled(**settings)
    [minibatch] = policy.annotate(batches)
    assert len(seen) == before * len(minibatch) and not any(seen)
    seen.clear()
    policy.counters.trust_sampler = True
    policy.annotate(batches)
    assert not seen, "the sampler's log-probs serve"
    rows = {row for micro in plan[0].micro_batches for row in micro}
    assert bool({3, 4, 5} & rows) == ("entropy_coef" in settings), "without a bonus they need not be computed"


def test_a_step_moves_only_the_chosen_tokens():
    """Weights after an update with all entropies alike are those without the setting; with others they are not."""
    ends = {}
    for name, share in (("all", 1.0), ("alike", 0.3), ("chosen", 0.3)):
        cfg = config(top_entropy_share=share)
        policy = make_policy(cfg, ALONE)
        prompts, completions, advantages = injected(cfg, 0)
        if name == "alike":
            completions = [dataclasses.replace(c, entropy=np.ones_like(c.entropy)) for c in completions]
        lengths = np.array([len(completion.token_ids) for completion in completions])
        table = table_of(cfg, lengths, np.zeros(len(lengths)))
        plan = make_plan(cfg, prompts, lengths, advantages, 1)
        batches = policy.annotate(deliver(ALONE, cfg, plan, prompts, completions, table, advantages))
        tally = Tally()
        policy.train_on(batches, tally, 9, False, on_skip=lambda *_: None)
        ends[name] = torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])
        shares = tally.reduce(ALONE).metrics.get("entropy/chosen")
        assert {"all": shares is None, "alike": shares == 1.0}.get(name, True)
    assert ends["alike"].equal(ends["all"]) and not ends["chosen"].equal(ends["all"])
