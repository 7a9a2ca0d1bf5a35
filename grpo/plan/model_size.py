"""What a model is made of, counted without storage, and in what form a run holds it: whole, frozen, in 4 bits.

grpo/plan/memory.py adds the figures up.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.quantization import MIN_8BIT_ELEMENTS

FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes an element: the code, its block's scale in 8 bits, that one's in fp32
FROZEN_NORMS = {  # bytes that frozen norms do not keep, by token and layer, for each of (hidden, queries, keys)
    "plain": {"fp32": (8, 0, 0), "bf16": (6, 0, 0)},
    "qk_norm": {"fp32": (8, 4, 4), "bf16": (6, 2, 2)},
    "four_norms": {"fp32": (16, 0, 0), "bf16": (16, 0, 0)},
    "gpt2": {"fp32": (0, 0, 0), "bf16": (0, 0, 0)},
}
EIGHT_BIT = 1 + 4 / 256  # of one moment: the code, its block's scale


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model; counts of elements."""

    parameters: int  # all, a tied head once
    products: int  # of matrices that multiply: those that bf16 arithmetic copies
    largest: int  # the largest tensor
    layers: int
    hidden: int
    queries: int  # heads times their width
    keys: int  # key heads times their width
    mlp: int
    vocab: int
    style: str  # a row of SAVED
    window: int  # tokens kept by each sliding layer; 0: no such layers
    sliding: int  # layers that keep a window
    score_heads: int  # heads whose whole score matrix is held: eager attention; else 0
    linears: tuple[tuple[str, int, int], ...] = ()  # name, inputs, outputs of each linear layer but the head
    small: int = 0  # elements in tensors below MIN_8BIT_ELEMENTS


def shape_of(config: PreTrainedConfig) -> Shape:
    """Build the model without storage and count. Raises UserError for what is no causal language model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model: {config.model_type!r} is no causal language model here: {error}") from None
    text = config.get_text_config()
    names = {name.split(".")[-2] for name, _ in model.named_parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    style = "four_norms" if "post_feedforward_layernorm" in names else "qk_norm" if "q_norm" in names else "plain"
    head = model.get_output_embeddings()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    sizes = [(name, *(m.weight.shape if isinstance(m, Conv1D) else m.weight.shape[::-1])) for name, m in linears]
    window = getattr(text, "sliding_window", None) or 0
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        products=matrices - (0 if tied else model.get_input_embeddings().weight.numel()),
        largest=max(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        mlp=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        style="gpt2" if config.model_type == "gpt2" else style,
        window=window,
        sliding=(getattr(text, "layer_types", None) or []).count("sliding_attention") if window else 0,
        score_heads=heads if getattr(text, "attn_logit_softcapping", None) else 0,
        linears=tuple((name, int(inputs), int(outputs)) for name, inputs, outputs in sizes),
        small=sum(p.numel() for p in model.parameters() if p.numel() < MIN_8BIT_ELEMENTS),
    )


@dataclass(frozen=True)
class Held:
    """A model as a run holds it: bytes, and counts of elements."""

    trained: int  # elements that the optimizer moves: all, or the adapter's
    trained_largest: int  # of one tensor among them
    weights: float  # bytes of all weights in use, frozen ones and the adapter
    moments: float  # bytes of the two moments, whole
    copies: float  # bytes of the bf16 copies that autocast keeps for the backward
    adapter_tokens: int  # bytes kept for the backward for each token, more than where all is trained (or fewer)


def held(cfg: Config, shape: Shape) -> Held:
    """What is trained, and how the rest is held."""
    eight_bit = cfg.optimizer != "adamw"
    if not cfg.lora_r:
        large = shape.parameters - shape.small
        moments = 8.0 * shape.small + 2 * EIGHT_BIT * large if eight_bit else 8.0 * shape.parameters
        copies = 2.0 * shape.products if cfg.dtype == "bf16" else 0.0
        return Held(shape.parameters, shape.largest, 4.0 * shape.parameters, moments, copies, 0)
    targets = cfg.lora_target_modules
    chosen = [
        (inputs, outputs)
        for name, inputs, outputs in shape.linears
        if targets == "all-linear" or any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    sizes = [cfg.lora_r * width for pair in chosen for width in pair]
    trained, inside = sum(sizes), sum(inputs * outputs for _, inputs, outputs in shape.linears)
    in_bf16 = cfg.dtype == "bf16" and cfg.backend != "deepspeed"
    each = FOUR_BIT if cfg.load_in_4bit else 2.0 if in_bf16 else 4.0
    moments = sum(2 * size * (EIGHT_BIT if eight_bit and size >= MIN_8BIT_ELEMENTS else 4) for size in sizes)
    norms = zip(FROZEN_NORMS[shape.style][cfg.dtype], (shape.hidden, shape.queries, shape.keys), strict=True)
    copied = shape.products - (inside if in_bf16 or cfg.load_in_4bit else 0) + trained
    return Held(
        trained=trained,
        trained_largest=max(sizes, default=0),
        weights=each * inside + 4.0 * (shape.parameters - inside + trained),
        moments=moments,
        copies=2.0 * copied if cfg.dtype == "bf16" else 0.0,
        adapter_tokens=len(chosen) * cfg.lora_r * (4 if cfg.dtype == "fp32" else 2)
        - shape.layers * sum(each * width for each, width in norms),
    )
