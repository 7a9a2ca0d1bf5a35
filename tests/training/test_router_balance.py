"""The load-balancing loss of mixtures of experts: by hand, as transformers computes it for one row, and for any cut.

transformers' own loss is the control: a product of means over the micro-batch, it changes with the cut. Two ranks are
compared with one in test_invariance.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.runtime.distributed import World
from grpo.sft.policy import SftPolicy
from grpo.training.collate import collate
from grpo.training.losses import row_weights
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.training.router_balance import RouterBalance
from grpo.training.special_micro_batches import halves
from grpo.types import Prompt, TrainRow
from tests.models.test_lora_families import COMMON, EXPERTS, MAMBA
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
COEFFICIENT = 0.5


def rows(num_rows=6, shared=True, seed=0):
    """Rows of two prompts, or of one each; row 2 has a masked token, so that it counts neither in f nor in P."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(1, 290, 30 if shared else rng.integers(3, 12)).tolist()) for _ in range(num_rows)]
    made = []
    for n in range(num_rows):
        count = int(rng.integers(3, 9))
        trained = np.ones(count, bool)
        trained[1] = n != 2
        ids, logprobs = rng.integers(1, 290, count).astype(np.int32), np.full(count, -5.0, np.float32)
        prompt = prompts[n // 3 if shared else n]
        made.append(TrainRow(n, prompt, ids, logprobs, None, float(n % 3 - 1), trained))
    return made


def policy_of(architecture="qwen3_moe", kind=Policy, **settings):
    cfg = Config(model="m", data="d", rewards={"r": 1.0}, router_aux_loss_coef=COEFFICIENT, **settings)
    return kind(cfg, ALONE, tiny_model(architecture, 300, spread=2.0))


def micro_batches(made, cuts):
    weights = row_weights("grpo", [int(row.trained.sum()) for row in made], 16)
    return [collate([made[n] for n in cut], {n: weights[n] for n in cut}, CPU) for cut in cuts]


def values_of(policy, micro):
    """a [B, T] of a micro-batch."""
    policy.scorer(micro)
    return policy.balance._of_tokens(micro)


def gradients(policy, micros):
    """The balancing loss alone of some micro-batches, and its gradient."""
    policy.model.zero_grad()
    total = 0.0
    for micro in micros:
        policy.scorer(micro)
        loss = policy.balance.add(torch.zeros_like(micro.weights), micro, {}).sum()
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def test_values_by_hand():
    """Two experts, one chosen: tokens go to 0, 0, 1, so f = (2/3, 1/3) and a_t = 2 (2/3 p_t0 + 1/3 p_t1)."""
    policy = policy_of()
    row = TrainRow(0, (5, 6), np.array([1, 2, 3]), np.zeros(3), None, 1.0)
    micro = collate([row], {0: 1 / 3}, CPU)  # tokens predicted at 1, 2, 3 of 4
    p = torch.tensor([[0.1, 0.9], [0.75, 0.25], [0.6, 0.4], [0.2, 0.8]])
    policy.balance.top_k, policy.balance.logits = 1, [p.log()]
    expected = [2 * (2 / 3 * a + 1 / 3 * b) for a, b in ((0.75, 0.25), (0.6, 0.4), (0.2, 0.8))]
    assert policy.balance._of_tokens(micro)[0].tolist() == pytest.approx(expected)
    policy.balance.logits = [p.log(), torch.zeros(4, 2)]  # a second layer, p = 1/2: a_t = 2 (1/2) = 1; the mean of both
    assert policy.balance._of_tokens(micro)[0].tolist() == pytest.approx([(value + 1) / 2 for value in expected])


def test_balanced_routing_gives_k():
    policy = policy_of()
    row = TrainRow(0, (5,), np.array([1, 2, 3, 4]), np.zeros(4), None, 1.0)
    micro = collate([row], {0: 0.25}, CPU)
    policy.balance.logits = [torch.eye(4) * 1e-4 + torch.eye(4).roll(1, 0) * 1e-4]
    assert policy.balance._of_tokens(micro).mean().item() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_one_row_and_layer_is_the_loss_of_transformers(shared):
    policy = policy_of()
    policy.scorer.shares_prompts = shared
    made = rows(shared=shared)
    [together] = micro_batches(made, [range(6)])
    assert (policy.scorer._worth_flattening(together) is not None) == shared, "the other form of the forward is tried"
    found = values_of(policy, together)
    for n, row in enumerate(made):
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids[:-1].tolist()]])
        logits = policy.model(input_ids=ids, output_router_logits=True).router_logits
        index = [len(row.prompt_ids) - 1 + t for t in range(len(row.token_ids)) if row.trained[t]]
        theirs = [load_balancing_loss_func((layer[index],), 4, 2).item() for layer in logits]
        ours = found[n][together.trained[n]].mean().item()
        assert ours == pytest.approx(sum(theirs) / len(theirs), abs=1e-5) and ours > 1.5


CUTS = {
    "one by one": [[n] for n in range(6)],
    "mixed": [[0, 5], [1, 2, 4], [3]],
    "groups": [[0, 1, 2], [3, 4, 5]],
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CUTS)
def test_loss_and_gradient_do_not_depend_on_the_cut(name, shared):
    policy = policy_of()
    policy.scorer.shares_prompts = shared
    made = rows(shared=shared)
    whole, gradient = gradients(policy, micro_batches(made, [range(6)]))
    parts, other = gradients(policy, micro_batches(made, CUTS[name]))
    assert whole > 0 and gradient.norm() > 1e-3
    assert parts == pytest.approx(whole, rel=1e-5)
    assert float((gradient - other).norm() / gradient.norm()) < 1e-4


def test_control_the_loss_of_transformers_depends_on_the_cut():
    policy = policy_of()
    made = rows()

    def theirs(cut):
        logits = [[], []]
        for n in cut:
            ids = torch.tensor([[*made[n].prompt_ids, *made[n].token_ids[:-1].tolist()]])
            found = policy.model(input_ids=ids, output_router_logits=True).router_logits
            for layer, part in zip(logits, found, strict=True):
                layer.append(part[len(made[n].prompt_ids) - 1 :])
        return load_balancing_loss_func(tuple(torch.cat(parts) for parts in logits), 4, 2).item()

    assert abs(sum(theirs([n]) for n in range(6)) / 6 - theirs(range(6))) > 1e-2


def test_a_micro_batch_that_is_halved_and_one_that_is_recomputed_give_the_same_gradient():
    made = rows()
    [together] = micro_batches(made, [range(6)])
    _, gradient = gradients(policy_of(), [together])
    for policy, micros in ((policy_of(), halves(together)), (policy_of(gradient_checkpointing=True), [together])):
        policy.backend.train(True)
        _, other = gradients(policy, micros)
        assert float((gradient - other).norm() / gradient.norm()) < 1e-4


def test_it_is_part_of_the_loss_and_of_the_metrics():
    """The loss of an update grows by the coefficient times the row's value times its weight; so it does in SFT."""
    made = [dataclasses.replace(row, advantage=0.0) for row in rows()]
    [micro] = micro_batches(made, [range(6)])
    for kind in (Policy, SftPolicy):
        extra = {"sft": {"solution_column": "s"}} if kind is SftPolicy else {}
        policy = policy_of(kind=kind, **extra)
        tally = Tally()
        loss = policy.loss(micro, tally, False)
        values = values_of(policy, micro)
        plain = kind(dataclasses.replace(policy.cfg, router_aux_loss_coef=0.0), ALONE, policy.model)
        without = plain.loss(micro, Tally(), False)
        expected = COEFFICIENT * (values * micro.weights).sum()
        assert float((loss - without).detach()) == pytest.approx(float(expected.detach()), rel=1e-4) and expected > 0.9
        measured = tally.reduce(ALONE).metrics["router_aux"]
        assert measured == pytest.approx(float(values[micro.trained].detach().mean()), rel=1e-5)


def test_rows_without_advantage_carry_gradient():
    prompts = [Prompt(p, "", (1, 2), {}) for p in range(2)]
    lengths, advantages = np.full(4, 3), np.array([1.0, -1.0, 0.0, 0.0])
    for coefficient, computed in ((0.0, {0, 1}), (0.1, {0, 1, 2, 3})):
        cfg = Config(num_generations=2, batch_size=2, router_aux_loss_coef=coefficient)
        [minibatch] = make_plan(cfg, prompts, lengths, advantages, 1)
        assert {n for micro in minibatch.micro_batches for n in micro} == computed


@pytest.mark.parametrize("kind", ["dense", "no experts", "another form"])
def test_a_model_without_router_logits_is_refused(kind):
    if kind == "dense":
        model = tiny_model("qwen3", 300)
    elif kind == "no experts":
        settings = {**COMMON, **MAMBA, "layers_block_type": ["mamba", "attention"], "shared_intermediate_size": 32}
        config = transformers.GraniteMoeHybridConfig(**settings, num_local_experts=0, num_experts_per_tok=0)
        model = AutoModelForCausalLM.from_config(config)
    else:  # Llama 4 gives router logits to no one
        config = transformers.Llama4TextConfig(**COMMON, **EXPERTS, head_dim=8, intermediate_size_mlp=48)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"router_aux_loss_coef: .* has no router logits to balance .* Set it to 0"):
        RouterBalance(Scorer(model.eval(), Config(router_aux_loss_coef=0.1)))


def test_its_range():
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="router_aux_loss_coef: must be a finite number >= 0"):
            check(Config(model="m", data="d", rewards={"r": 1.0}, router_aux_loss_coef=value))
