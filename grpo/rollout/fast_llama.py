"""The decoder layers of the Llama family for one token per row, without transformers' module calls.

A decode step of a small model, or of few rows, spends its time in Python calls rather than in arithmetic. Llama, Qwen2
and Qwen3 have the same layer; it is written out here, on the model's own modules, so that adapters and 4-bit layers
keep working:

    h += o(attention(rope(q(n(h))), rope(k(n(h))), v(n(h))));  h += down(act(gate(m(h))) up(m(h)))

The simple path is the model's own forward: `checked_fast_llama` in grpo/rollout/caches.py compares the two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # rope types whose angles do not depend on the sequence length
FAMILY = ("llama", "qwen2", "qwen3")  # model types; similar ones differ in windows, scales or norms


class FastLlama:
    """token ids [B], positions [B] and a cache -> hidden states [B, H]."""

    def __init__(self, body: Any):
        self.body = body
        self.rope: tuple[Tensor, Tensor] | None = None  # cos, sin [positions, 1, d]
        self.layers: list[_Layer] = []

    @classmethod
    def of(cls, model: PreTrainedModel, body: nn.Module) -> "FastLlama | None":
        """For a model of the family, not yet checked; None for any other."""
        return cls(body) if model.config.model_type in FAMILY else None

    def open(self) -> None:
        """Collect the model's modules again: some may have been replaced since the last batch."""
        self.layers = [_Layer(layer) for layer in self.body.layers]

    def __call__(self, token_ids: Tensor, positions: Tensor, cache: Any, limit: int) -> Tensor:
        """cache.mix: attention of one layer, see shared_cache.py. limit: greater than any position of the batch."""
        rows = len(token_ids)
        hidden = self.body.embed_tokens(token_ids)
        cos, sin = self._cos_sin(hidden, positions, limit)
        for number, layer in enumerate(self.layers):
            # query, key and value [B, heads, d]
            normed = layer.before_attention(hidden)
            query, key, value = (part(normed).view(rows, -1, layer.width) for part in layer.projections)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            # rotary embedding of queries and keys together
            heads = query.shape[1]
            both = torch.cat([query, key], 1)
            both = torch.addcmul(both * cos, both.roll(layer.width // 2, -1), sin)
            # attention, then the MLP
            mixed = cache.mix(number, both[:, :heads], both[:, heads:], value, layer.scale, layer.window)
            hidden = hidden + layer.out(mixed.reshape(rows, -1))
            normed = layer.before_mlp(hidden)
            hidden = hidden + layer.down(layer.act(layer.gate(normed)) * layer.up(normed))
        return _norm(self.body.norm)(hidden)

    def _cos_sin(self, hidden: Tensor, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, 1, d] of the rotary embedding; the first half of the sine is negated."""
        if getattr(self.body.rotary_emb, "rope_type", None) in FIXED_ROPE:
            if self.rope is None or len(self.rope[0]) < limit or self.rope[0].dtype != hidden.dtype:
                self.rope = self._compute_rope(hidden, torch.arange(limit, device=hidden.device))
            return self.rope[0][positions], self.rope[1][positions]
        return self._compute_rope(hidden, positions)

    def _compute_rope(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.body.rotary_emb(hidden[:, None], positions[:, None])  # [n, 1, d]
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


class _Layer:
    """The modules of a decoder layer, as functions."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.projections = [_linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.out = _linear(attention.o_proj)
        self.query_norm = _norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.before_attention, self.before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.gate, self.up, self.down = (_linear(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.act = mlp.act_fn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.window = getattr(attention, "sliding_window", None)


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module; a plain nn.Linear without hooks as a function, which skips Module.__call__."""
    if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """RMS norm in fp32, as the Llama family computes it."""
    shape, weight, eps = tuple(norm.weight.shape), norm.weight, norm.variance_epsilon

    def normed(hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float32 == weight.dtype:
            return rms_norm(hidden, shape, weight, eps)
        return rms_norm(hidden.float(), shape, weight.float(), eps).to(hidden.dtype)

    return normed
