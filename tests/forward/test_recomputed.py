"""Activations that are computed again: the model's own bits forward, its gradients, and less that is kept."""

import pytest
import torch
from torch import nn

from grpo.config.settings import Config
from grpo.forward.recomputed import Gated, recompute_cheap_activations
from grpo.models.checks import load_model
from grpo.runtime.distributed import start
from grpo.training.policy import Policy
from tests.support.tiny import ARCHITECTURES, save_tiny, tiny_model

IDS = torch.arange(2 * 40).view(2, 40) % 90 + 3


def outcome(model, dtype=None):
    """Logits, and the gradients of all parameters by name."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        logits = model(input_ids=IDS, use_cache=False).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model):
    """Bytes that the backward of a forward keeps, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return sum(size for size, _ in kept.values()), hidden


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_same_bits_and_gradients_the_same(architecture, dtype):
    plain, changed = (tiny_model(architecture, 100, spread=2.0) for _ in range(2))
    names = [name for name, _ in changed.named_modules()]
    count = recompute_cheap_activations(changed)
    assert (count > 0) == (architecture not in ("gpt2", "gptj"))
    assert recompute_cheap_activations(changed) == 0 and [name for name, _ in changed.named_modules()] == names
    logits, gradients = outcome(plain, dtype)
    found, others = outcome(changed, dtype)
    assert torch.equal(found, logits) and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        gap = float((others[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert gap < (1e-6 if dtype == "fp32" else 1e-2), (name, gap)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_less_is_kept(architecture):
    plain, changed = (tiny_model(architecture, 100) for _ in range(2))
    recompute_cheap_activations(changed)
    assert kept_bytes(changed)[0] < 0.8 * kept_bytes(plain)[0]


def test_frozen_parts_get_no_gradient():
    plain, changed = (tiny_model("qwen3", 100, spread=2.0) for _ in range(2))
    recompute_cheap_activations(changed)
    for model in (plain, changed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0" in name and ("up_proj" in name or "input_layernorm" in name))
    (_, gradients), (_, others) = outcome(plain), outcome(changed)
    assert len(gradients) == 2 and gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[name], others[name], rtol=1e-4, atol=1e-6) for name in gradients)


class Capped(nn.Module):
    """It has the parts of a gated MLP, and computes something else."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.01) * self.up_proj(x))


class TwoInputsRMSNorm(nn.Module):
    """A norm that takes a gate beside its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, gate=None):
        return self.weight * x * (1 if gate is None else gate)


def test_a_module_that_computes_something_else_is_left_alone():
    capped, norm = Capped(), TwoInputsRMSNorm()
    assert recompute_cheap_activations(nn.ModuleList([capped])) == 0 and type(capped) is Capped
    assert recompute_cheap_activations(nn.ModuleList([norm])) == 1 and isinstance(norm, TwoInputsRMSNorm)
    x = torch.ones(2, 4, requires_grad=True)
    norm(x, gate=torch.full((2, 4), 3.0)).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 3.0)) and torch.equal(norm.weight.grad, torch.full((4,), 6.0))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU()])
def test_the_gradient_of_a_gated_product(act):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: Gated.apply(act, g, u), (gate, up))


def test_with_gradient_checkpointing_whole_layers_are_recomputed_instead(tmp_path):
    folder = str(save_tiny(tmp_path))
    for checkpointing in (False, True):
        model = load_model(folder, torch.device("cpu"))
        Policy(Config(gradient_checkpointing=checkpointing), start(), model)
        assert (recompute_cheap_activations(model) > 0) == checkpointing
