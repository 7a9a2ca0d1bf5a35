"""Activations that cost little to compute are computed again in the backward, not kept.

    norm      weight * x / rms(x)               keeps x, which the residual stream keeps anyway
    gated     down(act(gate(x)) * up(x))        keeps gate(x) and up(x); not act(gate(x)), nor the input of `down`

These are elementwise, so computing them again costs a few per cent of an update's time; in a Llama-like model they are
two fifths of what the backward would keep. Outputs are those of the model's own code, bit for bit. What a module
computes is tried when the model is loaded; one that computes something else is left alone.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from grpo.config.settings import Config

TRIED_ROWS = 3
SILU = ("SiLU", "SiLUActivation")  # torch's class, and that of transformers


class Gated(torch.autograd.Function):
    """act(gate) * up, of which the two factors' inputs are kept."""

    @staticmethod
    def forward(ctx, act, gate, up):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        if type(ctx.act).__name__ in SILU:
            return None, torch.ops.aten.silu_backward(gradient * up, gate), gradient * ctx.act(gate)
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            activated = ctx.act(gate)
        return None, torch.autograd.grad(activated, gate, gradient * up)[0], gradient * activated.detach()


class RecomputedNorm(torch.autograd.Function):
    """norm(x), computed again in the backward; the gradient of its weight is that of the module's own parameter."""

    @staticmethod
    def forward(ctx, plain, x, weight):
        ctx.plain, ctx.weight = plain, weight
        ctx.save_for_backward(x)
        return plain(x)

    @staticmethod
    def backward(ctx, gradient):
        [x], (_, of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        x = x.detach().requires_grad_(of_x)
        wanted = [one for one, asked in ((x, of_x), (ctx.weight, of_weight)) if asked]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.plain(x), wanted, gradient))
        return None, next(found) if of_x else None, next(found) if of_weight else None


class NormMixin(nn.Module):
    """Before the class of a norm with one weight."""

    weight: Tensor

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """As the class's own."""
        plain, weight = super().forward, self.weight
        if rest or named or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return plain(x, *rest, **named)
        return RecomputedNorm.apply(plain, x, weight)


class GatedMixin(nn.Module):
    """Before the class of an MLP that computes down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Any:
        """As the class's own."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = Gated.apply(self.act_fn, gate, up)
        with saved_tensors_hooks(*_in_place_of(product, lambda: self.act_fn(gate) * up)):
            return self.down_proj(product)


def _in_place_of(tensor: Tensor, compute: Callable[[], Tensor]) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
    """Hooks that keep, in place of this tensor or a view of all of it, its shape alone."""
    place, size = tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        same = saved.data_ptr() == place and saved.numel() == size and saved.is_contiguous()
        return saved.shape if same else saved

    @torch.no_grad()
    def unpack(kept: Any) -> Tensor:
        return compute().view(kept) if isinstance(kept, torch.Size) else kept

    return pack, unpack


def recomputes_cheap(cfg: Config) -> bool:
    """Whether a run does this: not where whole layers are computed again, or activations wait in CPU memory anyway."""
    return not (cfg.gradient_checkpointing or cfg.activation_offload)


def recompute_cheap_activations(model: nn.Module) -> int:
    """Change the model's norms and gated MLPs in place. Returns how many."""
    changed = 0
    for module in list(model.modules()):
        mixin = NormMixin if _is_norm(module) else GatedMixin if _is_gated(module) else None
        if mixin is not None and not isinstance(module, mixin):
            cls = type(module)
            module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
            changed += 1
    return changed


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm in Python with one vector as its weight; torch's own ones keep little."""
    parameters = dict(module.named_parameters())
    named = "RMSNorm" in type(module).__name__ and not type(module).__module__.startswith("torch.")
    return named and list(parameters) == ["weight"] and parameters["weight"].ndim == 1


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return False
    gate, up, down, act = (cast(Any, getattr(module, name)) for name in names)
    try:
        x = torch.randn(1, TRIED_ROWS, gate.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(gate.weight.device)
        return torch.equal(module(x), down(act(gate(x)) * up(x)))
    except (RuntimeError, TypeError, AttributeError):
        return False
