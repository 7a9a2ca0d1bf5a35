"""Gradients of an update on completions of 4,096 tokens equal those of the loss written down naively, in float64.

Rows straddle every cut: a header that prompts share, groups of several lengths, several micro-batches. Control: the
same loss with another weighting is further away than 1e-2.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.config.settings import Config
from grpo.models.loading import prepare
from grpo.runtime.distributed import start
from grpo.training.exchange import deliver
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.types import Completion, Prompt, Table
from tests.support.tiers import short
from tests.support.tiny import ARCHITECTURES, tiny_config

LENGTHS = [4096, 1500, 40, 3000]  # two completions of two prompts each
GAINS = np.array([1.0, -0.7, 0.5, -1.2])
LIMIT, BROKEN = 1e-5, 1e-2


def model_of(architecture):
    config = tiny_config(architecture)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, 8192)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 1000
    torch.manual_seed(0)
    return prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def gradient_of(loss, model):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([part.double().flatten() for part in found])


def naive_gradient(model, prompts, completions, sampled, weighting):
    """The surrogate of losses.py over whole rows in float64, each row alone."""
    total = 0.0
    for n, ids in enumerate(completions):
        row = torch.tensor([*prompts[n // 2].token_ids, *ids.tolist()])
        logits = model(input_ids=row[None], use_cache=False).logits[0, -len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, row[-len(ids) :, None])[:, 0]
        ratio = (logprobs - torch.from_numpy(sampled[n]).double()).exp()
        loss = -torch.minimum(ratio * GAINS[n], ratio.clamp(0.8, 1.2) * GAINS[n])
        divisor = len(ids) * len(completions) if weighting == "grpo" else sum(LENGTHS)
        total = total + gradient_of(loss.sum() / divisor, model)
    return total


@pytest.mark.parametrize("architecture", short(ARCHITECTURES, ["gemma3"]))
def test_gradients_at_4096_tokens_equal_the_naive_loss(architecture):
    cfg = Config(num_generations=2, batch_size=2, micro_batch_tokens=5000, max_generate_length=4096, num_iterations=2)
    world = start("cpu", torch.get_num_threads())
    generator = np.random.default_rng(0)
    header = tuple(generator.integers(1, 300, 40).tolist())
    prompts = [Prompt(p, "", (*header, *generator.integers(1, 300, 9 + p).tolist()), {}) for p in range(2)]
    completions = [generator.integers(1, 300, length, dtype=np.int32) for length in LENGTHS]
    model = model_of(architecture)
    # what was sampled from: ratios on both sides of the clip
    sampled = []
    with torch.no_grad():
        for n, ids in enumerate(completions):
            row = torch.tensor([*prompts[n // 2].token_ids, *ids.tolist()])
            logits = model(input_ids=row[None], use_cache=False).logits[0, -len(ids) - 1 : -1]
            exact = logits.log_softmax(-1).gather(-1, row[-len(ids) :, None])[:, 0].numpy()
            sampled.append((exact + generator.normal(0, 0.15, len(ids))).astype(np.float32))
    lengths = np.array(LENGTHS)
    table = Table([], np.zeros((4, 0)), np.zeros(4), {"length": lengths, "trained": lengths}, 2)
    rows = [Completion(n, completions[n], sampled[n], "stop") for n in range(4)]
    policy = Policy(cfg, world, model)
    policy.counters.trust_sampler = True
    plan = make_plan(cfg, prompts, lengths, GAINS, 1, policy.scorer.shares_prompts)
    [batches] = policy.annotate(deliver(world, cfg, plan, prompts, rows, table, GAINS))
    assert len(batches) > 1
    ours = sum(gradient_of(policy.loss(micro, Tally(), False), model) for micro in batches)

    model.double()
    naive = {how: naive_gradient(model, prompts, completions, sampled, how) for how in ("grpo", "dapo")}
    distance = {how: float((ours - exact).norm() / exact.norm()) for how, exact in naive.items()}
    assert distance["grpo"] < LIMIT and distance["dapo"] > BROKEN, distance
