"""What a run with an adapter, 4-bit weights or 8-bit moments holds, counted on built models; what leaves the GPU."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.forward.precision import arithmetic
from grpo.forward.recomputed import recompute_cheap_activations
from grpo.models import lora as adapters
from grpo.models.loading import prepare
from grpo.models.offload import ActivationOffload, on_device
from grpo.plan.command import GB, advise, main
from grpo.plan.memory import estimate, estimate_for, layer_bytes
from grpo.plan.model_size import model_size, model_states
from grpo.runtime.distributed import World
from grpo.training.load_policy import load_policy
from grpo.training.policy import Policy
from tests.models.test_lora import shaken
from tests.plan.test_plan import ZERO3, arguments, folder, large_config, row  # noqa: F401
from tests.support.tiny import save_tiny, tiny_config, tiny_model

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
IDS = torch.arange(4, 52)[None]


def settings(**how):
    return Config(**{"model": "m", "data": "d", "rewards": {"r": 1.0}, "device": "cpu", **how})


# --- counted on built models

WAYS = {
    "whole": {},
    "whole, 8-bit": {"optimizer": "adamw_8bit"},
    "adapter": {"lora_r": 4},
    "adapter, bf16": {"lora_r": 4, "dtype": "bf16"},
    "adapter of two": {"lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "adapter, 8-bit": {"lora_r": 128, "optimizer": "adamw_8bit"},
    "4 bits": {"lora_r": 4, "load_in_4bit": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_weights_and_moments_are_counted_to_the_byte(tmp_path, architecture, way):
    """Against the tensors themselves after an update; 4-bit weights, whose scales are padded here, within 5 %."""
    if "bit" in way:
        pytest.importorskip("bitsandbytes")
    cfg = settings(model=str(save_tiny(tmp_path / "base", architecture, spread=1.0)), **WAYS[way])
    policy = load_policy(cfg, ALONE)
    with arithmetic(cfg.dtype, CPU):
        loss = policy.model(IDS, labels=IDS).loss
    policy.backend.backward(loss, last=True)
    policy.backend.step(1e-3, 1.0)
    found = model_states(cfg, model_size(policy.model.config))
    parameters = list(policy.model.parameters())
    assert found.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert found.trained_largest == max(p.numel() for p in parameters if p.requires_grad)
    states = [getattr(p, "quant_state", None) for p in parameters]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states if s is not None)
    assert found.weights == pytest.approx(sum(p.data.nbytes for p in parameters) + scales, rel=0.05 if scales else 1e-9)
    moments = sum(values.nbytes for name, values in policy.backend.local_tensors() if " of " in name)
    assert found.moments == pytest.approx(moments, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_activations_with_an_adapter_are_what_autograd_keeps(architecture, dtype):
    """The bytes of one more layer, weights and their copies left out, as tests/plan/test_plan.py counts them."""

    def saved(layers):
        config = tiny_config(architecture)
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
        model = shaken(adapters.start_lora(model, settings(lora_r=4)))
        recompute_cheap_activations(model)
        model.enable_input_require_grads()
        shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
        kept = {}

        def keep(tensor):
            if tuple(tensor.shape) not in shapes:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), arithmetic(dtype, CPU):
            model.base_model(input_ids=torch.arange(90).view(2, 45) % 300, use_cache=False)
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    size = model_size(tiny_config(architecture))
    cfg = settings(lora_r=4, dtype=dtype)
    estimated = layer_bytes(size, 90, 45, dtype, True) + 90 * model_states(cfg, size).adapter_tokens / size.layers
    assert estimated == pytest.approx(saved(4) - saved(3), rel=0.1)


# --- what the plan says of them


def test_an_adapter_needs_no_moments_gradients_or_reference_worth_naming():
    whole, lora, four = (
        dataclasses.replace(settings(beta=0.1, device="cuda", dtype="bf16", micro_batch_tokens=1024), **how)
        for how in ({}, {"lora_r": 16}, {"lora_r": 16, "load_in_4bit": True})
    )
    found = [estimate(cfg, large_config(), 1) for cfg in (whole, lora, four)]
    parameters = found[0].size.parameters
    assert row(found[0], "reference") == 4 * parameters and row(found[1], "reference") == 0
    assert row(found[1], "moments") < 0.05 * row(found[0], "moments")
    assert row(found[2], "weights") < row(found[1], "weights") < row(found[0], "weights")
    assert found[2].peak() < found[1].peak() < 0.5 * found[0].peak()
    assert found[1].traffic == () or sent_bytes(found[1]) == 0


def sent_bytes(found):
    return sum(each.bytes for each in found.traffic)


def test_zero_sends_the_adapter_and_gathers_the_whole():
    both = [estimate(dataclasses.replace(ZERO3, **how), large_config(), 8) for how in ({}, {"lora_r": 8})]
    names = [{each.name: each.bytes for each in found.traffic} for found in both]
    assert names[1]["gradients, reduce-scatter"] < 0.05 * names[0]["gradients, reduce-scatter"]
    assert names[1]["weights, forward and backward"] > names[0]["weights, forward and backward"]


def test_offloading_moves_bytes_to_the_host():
    base = settings(device="cuda", beta=0.1, micro_batch_tokens=8192)
    size = model_size(large_config())
    before = estimate_for(base, size, 1)
    for name, what in (("activation_offload", "activations"), ("reference_offload", "reference")):
        after = estimate_for(dataclasses.replace(base, **{name: True}), size, 1)
        assert after.at("update") < before.at("update") and after.host_bytes > before.host_bytes
        assert (row(after, what) < row(before, what)) or name == "reference_offload"


def test_the_advice_knows_them_and_never_on_a_cpu():
    lean = {"backend": "deepspeed", "zero_stage": 3, "offload": "all", "rollout_chunk_rows": 1, "logits_chunk_mb": 1}
    lengths = {"max_generate_length": 8192, "micro_batch_tokens": 1, "num_generations": 2, "lora_r": 4}
    cfg = settings(device="cuda", gradient_checkpointing=True, **lean, **lengths)
    size = model_size(large_config())
    remedies = [dict(advise(cfg, size, 1, share / 20 * estimate_for(cfg, size, 1).peak())) for share in range(1, 20)]
    assert any("activation_offload" in remedy for remedy in remedies)
    on_cpu = dataclasses.replace(cfg, device="cpu")
    peak = estimate_for(on_cpu, size, 1).peak()
    assert not any("activation_offload" in dict(advise(on_cpu, size, 1, share / 20 * peak)) for share in range(1, 20))


def test_the_command_says_what_an_adapter_would_need(folder, capsys):  # noqa: F811
    assert main(arguments(folder, "--gpus=1", "--gpu_memory", "1")) == 0
    printed = capsys.readouterr().out
    assert "No setting makes it fit" in printed and "An adapter alone (--lora_r 16) needs" in printed
    assert main(arguments(folder, "--gpus=1", "--gpu_memory", "80", "--lora_r", "16")) == 0
    size = model_size(large_config())
    trained = model_states(settings(lora_r=16), size).trained
    printed = capsys.readouterr().out
    assert f"{trained / 1e6:.1f} million trained" in printed and "FITS" in printed
    assert estimate_for(settings(lora_r=16), size, 1).peak() < 80 * GB


# --- what leaves the GPU


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parked_activations_change_no_gradient(checkpointing):
    """Here from CPU memory to CPU memory: what is parked comes back, and weights are not parked."""
    gradients, parked = [], []
    for offload in (False, True):
        cfg = settings(activation_offload=offload, gradient_checkpointing=checkpointing)
        policy = Policy(cfg, ALONE, tiny_model("llama", 300))
        policy.model.train()
        ids = torch.arange(4 * 60).view(4, 60) % 300
        with policy.activation_offload.around(offload):
            loss = policy.model(ids, labels=ids).loss
        loss.backward()
        gradients.append([p.grad for p in policy.model.parameters()])
        parked.append(policy.activation_offload.bytes_moved)
    for parked_gradient, plain in zip(*gradients):  # without offload, norms are computed again: other last bits
        assert torch.allclose(parked_gradient, plain, rtol=1e-4, atol=1e-7)
    assert parked[0] == 0 and parked[1] > 240 * 32 * 4 * 2, "less than each layer's input"


def test_weights_stay_where_they_are():
    model = nn.Linear(64, 128)
    activation_offload = ActivationOffload(model)
    with activation_offload.around(True):
        model(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert activation_offload.bytes_moved == 0
    with activation_offload.around(True):
        model(torch.randn(256, 64, requires_grad=True)).square().sum().backward()
    assert activation_offload.bytes_moved >= 256 * 64 * 4


@pytest.mark.parametrize("how", [{"activation_offload": True}, {"reference_offload": True, "beta": 0.1}])
def test_moving_to_the_cpu_is_refused_on_the_cpu(tmp_path, how):
    cfg = settings(model=str(save_tiny(tmp_path / "base")), **how)
    with pytest.raises(UserError, match=rf"^{next(iter(how))}: it moves tensors from a GPU"):
        load_policy(cfg, ALONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["activations", "reference"])
def test_offloading_on_a_gpu(tmp_path, way):
    """Less of the GPU's memory while it is away, and the same log-probs."""
    device = torch.device("cuda")
    base = str(save_tiny(tmp_path / "base", "qwen3"))
    cfg = settings(model=base, device="cuda", beta=0.1)
    if way == "activations":
        ids = torch.arange(16 * 200, device=device).view(16, 200) % 300
        kept = []
        for offload in (False, True):
            policy = Policy(cfg, World(0, 1, 0, 1, device), tiny_model("qwen3").to(device))
            with policy.activation_offload.around(offload):
                loss = policy.model(ids, labels=ids).loss
            kept.append(torch.cuda.memory_allocated())
            loss.backward()
            del policy, loss
        assert kept[1] < kept[0]
    else:
        policy = load_policy(dataclasses.replace(cfg, reference_offload=True), World(0, 1, 0, 1, device))
        assert all(p.device.type == "cpu" for p in policy.reference.parameters())
        with on_device(policy.reference, device):
            assert all(p.device.type == "cuda" for p in policy.reference.parameters())
