"""The decoder layers of the Llama family, called without what transformers wraps around them.

A decode step of a small model, or of few rows, is bound by the calls and not by the arithmetic. Llama, Qwen2 and Qwen3
share one layer; here it is once more, on the model's own modules, so that adapters and 4-bit layers stay what they are:

    h += o(attention(rope(q(n(h))), rope(k(n(h))), v(n(h))));  h += down(act(gate(m(h))) up(m(h)))

grpo/rollout/native.py compares it with the model's own forward before it is used.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

FAMILY = ("llama", "qwen2", "qwen3")  # model types; others of like shape differ in windows, scales or norms


class LeanBody:
    """token ids [B, 1], positions [B, 1] and a cache -> hidden states [B, 1, H]."""

    def __init__(self, body: Any):
        self.body = body

    def __call__(self, token_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """cache.attend is called as in grpo/attention.py."""
        body = self.body
        hidden = body.embed_tokens(token_ids)
        cos, sin = (part[:, None] for part in body.rotary_emb(hidden, positions))  # [B, 1, 1, d]
        for number, layer in enumerate(body.layers):
            own = layer.self_attn
            normed = _norm(hidden, layer.input_layernorm)
            query, key, value = (
                part(normed).view(*token_ids.shape, -1, own.head_dim) for part in (own.q_proj, own.k_proj, own.v_proj)
            )
            if hasattr(own, "q_norm"):
                query, key = _norm(query, own.q_norm), _norm(key, own.k_norm)
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            window = getattr(own, "sliding_window", None)
            mixed = cache.attend(number, query, key, value, own.scaling, window)
            hidden = hidden + own.o_proj(mixed.reshape(*token_ids.shape, -1))
            normed = _norm(hidden, layer.post_attention_layernorm)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return _norm(hidden, body.norm)


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    """RMS norm in fp32, as the Llama family has it."""
    return rms_norm(hidden.float(), hidden.shape[-1:], norm.weight.float(), norm.variance_epsilon).to(hidden.dtype)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


def lean_body(model: PreTrainedModel, body: nn.Module) -> LeanBody | None:
    """The lean form of a body of the family; None for any other."""
    return LeanBody(body) if model.config.model_type in FAMILY else None
