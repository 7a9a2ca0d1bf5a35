"""The decoder layers of the Llama family, called without what transformers wraps around them.

A decode step of a small model, or of few rows, is bound by the calls and not by the arithmetic. Llama, Qwen2 and Qwen3
share one layer; here it is once more, on the model's own modules, so that adapters and 4-bit layers stay what they are:

    h += o(attention(rope(q(n(h))), rope(k(n(h))), v(n(h))));  h += down(act(gate(m(h))) up(m(h)))

grpo/rollout/engine.py compares it with the model's own forward before it is used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

CONSTANT = ("default", "linear", "llama3", "yarn")  # ways to turn that do not depend on how long the text has become
FAMILY = ("llama", "qwen2", "qwen3")  # model types; others of like shape differ in windows, scales or norms


class FastLlama:
    """token ids [B], positions [B] and a cache -> hidden states [B, H]."""

    def __init__(self, body: Any):
        self.body = body
        self.angles: tuple[Tensor, Tensor] | None = None  # cos, sin [positions, 1, d]
        self.layers: list[_Layer] = []

    def open(self) -> None:
        """Look at the model anew: its parts may have been exchanged since the last batch."""
        self.layers = [_Layer(layer) for layer in self.body.layers]

    def __call__(self, token_ids: Tensor, positions: Tensor, cache: Any, limit: int) -> Tensor:
        """cache.mix is called as in shared_cache.py. limit: above all positions to come."""
        rows = len(token_ids)
        hidden = self.body.embed_tokens(token_ids)
        cos, sin = self._turns(hidden, positions, limit)
        for number, layer in enumerate(self.layers):
            normed = layer.before_attention(hidden)
            query, key, value = (part(normed).view(rows, -1, layer.width) for part in layer.projections)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            heads = query.shape[1]
            both = torch.cat([query, key], 1)
            both = torch.addcmul(both * cos, both.roll(layer.width // 2, -1), sin)
            mixed = cache.mix(number, both[:, :heads], both[:, heads:], value, layer.scale, layer.window)
            hidden = hidden + layer.out(mixed.reshape(rows, -1))
            normed = layer.before_mlp(hidden)
            hidden = hidden + layer.down(layer.act(layer.gate(normed)) * layer.up(normed))
        return _norm(self.body.norm)(hidden)

    def _turns(self, hidden: Tensor, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, 1, d] by which halves of queries and keys turn; the sine's first half is negative."""
        if getattr(self.body.rotary_emb, "rope_type", None) in CONSTANT:
            if self.angles is None or len(self.angles[0]) < limit or self.angles[0].dtype != hidden.dtype:
                self.angles = self._angles(hidden, torch.arange(limit, device=hidden.device))
            return self.angles[0][positions], self.angles[1][positions]
        return self._angles(hidden, positions)

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.body.rotary_emb(hidden[:, None], positions[:, None])  # [n, 1, d]
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


class _Layer:
    """A decoder layer's parts as functions."""

    def __init__(self, layer: Any):
        own, mlp = layer.self_attn, layer.mlp
        self.projections = [_linear(part) for part in (own.q_proj, own.k_proj, own.v_proj)]
        self.out = _linear(own.o_proj)
        self.query_norm = _norm(own.q_norm) if hasattr(own, "q_norm") else None
        self.key_norm = _norm(own.k_norm) if hasattr(own, "k_norm") else None
        self.before_attention, self.before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.gate, self.up, self.down = (_linear(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.act = mlp.act_fn
        self.width, self.scale = own.head_dim, own.scaling
        self.window = getattr(own, "sliding_window", None)


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module; where it is torch's plain linear layer and nobody listens, without the call of a module."""
    if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """RMS norm in fp32, as the Llama family has it."""
    shape, weight, eps = tuple(norm.weight.shape), norm.weight, norm.variance_epsilon

    def normed(hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float32 == weight.dtype:
            return rms_norm(hidden, shape, weight, eps)
        return rms_norm(hidden.float(), shape, weight.float(), eps).to(hidden.dtype)

    return normed


def fast_llama(model: PreTrainedModel, body: nn.Module) -> FastLlama | None:
    """The lean form of a body of the family; None for any other."""
    return FastLlama(body) if model.config.model_type in FAMILY else None
