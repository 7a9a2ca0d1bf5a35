"""Training on the emulated device: the weights of a run on CPU, no tensor left on the CPU, one device sync."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from grpo.checkpoints import background as saving
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.resume import restore
from grpo.data.recipe import Recipe
from grpo.forward import flat_rows as flattening
from grpo.forward import logprobs
from grpo.forward import shared_attention as attention
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import World
from grpo.training.collate import collate
from grpo.training.exchange import deliver
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.training.reference_renewal import renew_reference
from grpo.training.skipped_updates import SkippedUpdate
from grpo.types import TrainRow
from tests import emulated
from tests.emulated.rollout_cases import CPU, LONG, NEW, SHORT, requests_of
from tests.support.rank_jobs import VOCAB, config, injected, injected_step, table_of, with_adapter
from tests.support.tiers import sampled, short
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def device():
    torch.set_num_threads(1)
    return emulated.register()


def policy_on(where, cfg, architecture="qwen3", seed=0, spread=2.0):
    reference = (
        tiny_model(architecture, VOCAB, seed=1, spread=2.0).to(where) if cfg.beta > 0 and not cfg.lora_r else None
    )
    model = tiny_model(architecture, VOCAB, seed=seed, spread=spread).to(where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Policy(cfg, World(0, 1, 0, 1, where), with_adapter(cfg, model), reference)


def weights_of(policy):
    return {name: tensor.cpu().clone() for name, tensor in policy.weights()}


def distance(a, b):
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def trained(where, cfg, architecture, steps=3):
    """Weights before and after, gradient norms, the reduced tally."""
    policy, tally, norms = policy_on(where, cfg, architecture), Tally(), []
    before = weights_of(policy)
    for step in range(steps):
        norms += injected_step(cfg, policy.world, policy, step, steps, 0, tally)
    return before, weights_of(policy), norms, tally.reduce(policy.world).metrics


SETTINGS = {
    "plain": {},
    "kl": {"beta": 0.1},
    "deterministic": {"deterministic": True},
    "truncated": {"temperature": 0.7, "top_p": 0.9},
    "dapo": {"weighting": "dapo", "clip_eps_high": 0.3},
    "checkpointing": {"gradient_checkpointing": True},
    "several updates": {"num_iterations": 2, "num_minibatches": 2},
    "blocks": {"logits_chunk_mb": 1, "micro_batch_tokens": 200},
    "lora": {"lora_r": 4, "beta": 0.1},
    "clipped": {"weight_decay": 0.1, "max_grad_norm": 0.01},
    "checksums": {"check_weights_steps": 1},
    "parked": {"activation_offload": True},
}


SOME = ("plain", "truncated", "blocks")  # two architectures suffice for the rest
MATRIX = [
    (a, s) for a in ("llama", "qwen3", "gemma2", "gpt2") for s in SETTINGS if a in ("llama", "qwen3") or s in SOME
]
[EVERYTHING] = sampled(["llama", "qwen3"], seed=1)


@pytest.mark.parametrize(
    ("architecture", "settings"), short(MATRIX, [case for case in MATRIX if EVERYTHING in case or "plain" in case])
)
def test_training_ends_where_it_ends_on_the_cpu(architecture, settings, device):
    cfg = config(**SETTINGS[settings])
    start, expected, norms, metrics = trained(CPU, dataclasses.replace(cfg, activation_offload=False), architecture)
    _, found, our_norms, our_metrics = trained(device, cfg, architecture)
    assert distance(expected, found) < 1e-3 * distance(expected, start)
    np.testing.assert_allclose(our_norms, norms, rtol=1e-4)
    for name in ("loss", "kl_old", "clip/low", "clip/high"):
        assert our_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("mixup", [0.6, 1.0])
def test_an_offloaded_reference_is_renewed_where_it_lies(mixup, device):
    """It stays in CPU memory, and the run ends where it ends on the CPU; with a reference that stays it does not."""
    settings = {"beta": 0.3, "reference_sync_steps": 1, "reference_mixup": mixup}
    ends, references = {}, {}
    for name, where, cfg in (
        ("cpu", CPU, config(**settings)),
        ("offloaded", device, config(**settings, reference_offload=True)),
        ("stays", device, config(beta=0.3, reference_offload=True)),
    ):
        policy = policy_on(where, cfg)
        policy.reference.to("cpu")
        for step in range(3):
            injected_step(cfg, policy.world, policy, step, 3, 0, Tally())
            assert {parameter.device for parameter in policy.reference.parameters()} == {CPU}
            renew_reference(policy, step + 1)
        ends[name] = weights_of(policy)
        references[name] = {key: tensor.clone() for key, tensor in policy.reference.model.named_parameters()}
    start, fixed = (weights_of(policy_on(CPU, config(), seed=seed)) for seed in (0, 1))
    for found, begin in ((ends, start), (references, fixed)):
        length = distance(found["cpu"], begin)
        assert distance(found["cpu"], found["offloaded"]) < 1e-3 * length < distance(found["cpu"], found["stays"])
    if mixup == 1.0:
        assert all(torch.equal(references["offloaded"][name], end) for name, end in ends["offloaded"].items())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_bf16_trains_in_the_same_direction(architecture, device):
    cfg = config(dtype="bf16")
    start, expected, _, _ = trained(CPU, config(), architecture, steps=1)
    _, found, norms, _ = trained(device, cfg, architecture, steps=1)
    length, gap = distance(expected, start), distance(expected, found)
    assert np.isfinite(norms).all() and 0 < gap < 0.5 * length, gap / length


def minibatch_of(policy, cfg):
    prompts, completions, advantages = injected(cfg, 0)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, 1)
    table = table_of(cfg, lengths, np.zeros(len(completions)))
    [minibatch] = policy.annotate(deliver(policy.world, cfg, plan, prompts, completions, table, advantages, 0))
    return minibatch


@pytest.mark.parametrize("settings", ["plain", "kl", "truncated", "checkpointing", "lora"])
def test_an_update_has_one_device_sync_for_any_number_of_micro_batches(settings, device, monkeypatch):
    """The measurements and the norm are read; nothing is copied to the device. Every micro-batch is flattened."""
    monkeypatch.setattr(logprobs, "FLAT_BELOW", 10.0)
    cfg = config(**SETTINGS[settings])
    policy = policy_on(device, cfg)
    for count in (1, 3):
        minibatch = minibatch_of(policy, cfg)[:count]  # new each time, so that nothing is cached by an earlier forward
        assert len(minibatch) == count and all(micro.flat is not None for micro in minibatch)
        with emulated.counted() as reads:
            policy.update(minibatch, Tally(), 10, True)
        assert {(what, where.split(":")[0]): n for (what, where), n in reads.seen.items()} == {
            ("to host", "metrics.py"): 1,
            ("item", "ddp.py"): 1,
        }


def test_a_number_that_is_not_finite_skips_the_update_and_a_flipped_bit_is_found(device):
    cfg = config(check_weights_steps=1)
    policy = policy_on(device, cfg)
    injected_step(cfg, policy.world, policy, 0, 3, 0, Tally())
    assert policy.changed_tensor() is None
    for name, tensor in policy.backend.local_tensors():
        bits = tensor.view(-1)[-1:].view(torch.int32)
        bits ^= 1 << 11
        assert policy.changed_tensor() is not None, name
        bits ^= 1 << 11
    before, true_loss = weights_of(policy), policy.loss
    policy.loss = lambda *args: true_loss(*args) * float("nan")
    with pytest.raises(SkippedUpdate):
        policy.update(minibatch_of(policy, cfg), Tally(), 10, True)
    assert distance(before, weights_of(policy)) == 0.0
    policy.loss = true_loss
    policy.update(minibatch_of(policy, cfg), Tally(), 10, True)
    assert distance(before, weights_of(policy)) > 0.0


def test_a_micro_batch_that_is_too_large_is_tried_in_halves(device):
    cfg = config()
    start, expected, _, _ = trained(CPU, cfg, "qwen3")
    policy, tally = policy_on(device, cfg), Tally()
    true_loss = policy.loss

    def loss(micro, *args):
        if micro.input_ids.numel() > 30:
            raise torch.OutOfMemoryError("out of memory")
        return true_loss(micro, *args)

    policy.loss = loss
    for step in range(3):
        injected_step(cfg, policy.world, policy, step, 3, 0, tally)
    assert policy.fitting.halvings > 0
    assert distance(expected, weights_of(policy)) < 1e-3 * distance(expected, start)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_checkpoint_goes_from_one_device_to_the_other(lora, device, tmp_path):
    cfg = config(lora_r=lora)
    whole = policy_on(CPU, cfg)
    start = weights_of(whole)
    for step in range(4):
        injected_step(cfg, whole.world, whole, step, 4, 0, Tally())
    for first, second in ((CPU, device), (device, CPU), (device, device)):
        half, folder = policy_on(first, cfg), tmp_path / f"{first.type}-{second.type}"
        for step in range(2):
            injected_step(cfg, half.world, half, step, 4, 0, Tally())
        half.counters.step = 2
        checkpoint.make_output(folder)
        taken = checkpoint.take_snapshot(
            2, half, saving.serialized_tokenizer(tiny_tokenizer()), Recipe("", "{question}", []), cfg, {}
        )
        assert all(tensor.is_cpu for tensor in (*taken.weights.values(), *taken.moments.values()))
        assert checkpoint.write_snapshot(taken, folder, half.world, None, lambda phase: None) is None
        rest = policy_on(second, cfg)
        with torch.no_grad():
            for (_, ours), (_, theirs) in zip(rest.weights(), half.weights(), strict=True):
                ours.copy_(theirs)
        assert restore(rest, folder / "checkpoint_2") == 2
        assert {tensor.device for _, tensor in rest.backend.local_tensors()} == {second}
        for step in (2, 3):
            injected_step(cfg, rest.world, rest, step, 4, 0, Tally())
        assert distance(weights_of(rest), weights_of(whole)) < 1e-3 * distance(weights_of(whole), start)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_in_bf16_sampler_and_trainer_agree(architecture, lengths, device):
    """Autocast as on CUDA; the control is another model's log-probs."""
    cfg = config(dtype="bf16", max_generate_length=NEW)
    requests = requests_of((), lengths)
    policy = policy_on(device, cfg, architecture, spread=1.5)
    completions = NativeEngine(policy.model, range(12), NEW, 3, "bf16").generate(requests, Sampling())
    gaps = [gap_of(p, requests, completions, cfg) for p in (policy, policy_on(device, cfg, architecture, seed=3))]
    assert gaps[0] < 0.02 < gaps[1], gaps


def gap_of(policy, requests, completions, cfg):
    """Mean absolute difference of the sampler's and the trainer's log-probs."""
    rows = [
        TrainRow(c.row, r.prompt_ids, c.token_ids, c.sampler_logprobs, None, 1.0)
        for r, c in zip(requests, completions, strict=True)
    ]
    micro = collate(rows, {row.row: 1.0 for row in rows}, policy.world.device)
    with torch.no_grad():
        gap = (policy.backend.score(micro) - micro.sampler_logprobs).abs()
    return float(gap[micro.trained].mean())


@pytest.mark.parametrize("forgotten", ["positions", "padded index", "mask"])
def test_an_update_with_a_tensor_left_on_the_cpu_is_refused(forgotten, device, monkeypatch):
    cfg = config()
    policy = policy_on(device, cfg)
    if forgotten == "positions":
        plain = flattening.flatten
        moved = lambda *args: dataclasses.replace(plain(*args), positions=plain(*args).positions.cpu())  # noqa: E731
        monkeypatch.setattr("grpo.training.collate.flatten", moved)
    elif forgotten == "padded index":
        plain_runs = attention.SharedPrompts.runs.func

        def on_cpu(shared_prompts):
            return [
                [attention.Run(run.tokens, *(tensor.cpu() for tensor in run[1:])) for run in runs]
                for runs in plain_runs(shared_prompts)
            ]

        monkeypatch.setattr(attention.SharedPrompts, "runs", property(on_cpu))
    minibatch = minibatch_of(policy, cfg)
    if forgotten == "mask":
        minibatch = [dataclasses.replace(micro, trained=micro.trained.cpu()) for micro in minibatch]
    with pytest.raises(RuntimeError, match=r"same device|on cpu or on"):
        policy.update(minibatch, Tally(), 10, True)
