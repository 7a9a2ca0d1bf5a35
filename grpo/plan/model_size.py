"""Counts of a model's elements, without allocating its weights, and the bytes of its states in a run.

grpo/plan/memory.py adds the figures up.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from grpo.config.settings import Config, is_deepspeed
from grpo.errors import UserError
from grpo.forward.recomputed import recomputes_cheap
from grpo.models.quantization import MIN_8BIT_ELEMENTS

FP32_BYTES, BF16_BYTES = 4, 2
# bitsandbytes' block-wise quantization: elements that share a scale, and scales that share an fp32 scale of their own
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
NF4_BYTES = 4 / 8 + 1 / NF4_BLOCK + FP32_BYTES / (NF4_BLOCK * NF4_SCALE_BLOCK)  # code + 8-bit scale + its fp32 scale
MOMENT_BLOCK = 256
MOMENT_8BIT_BYTES = 1 + FP32_BYTES / MOMENT_BLOCK  # code + fp32 scale, for an element of one moment
FROZEN_NORMS = {  # bytes that frozen norms do not keep, by token and layer, for each of (hidden, queries, keys)
    "plain": {"fp32": (8, 0, 0), "bf16": (6, 0, 0)},
    "qk_norm": {"fp32": (8, 4, 4), "bf16": (6, 2, 2)},
    "four_norms": {"fp32": (16, 0, 0), "bf16": (16, 0, 0)},
    "gpt2": {"fp32": (0, 0, 0), "bf16": (0, 0, 0)},
}


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model's elements and layers, from which memory is computed."""

    parameters: int  # all elements; a tied head counts once
    products: int  # elements of the weights of matrix products, which bf16 arithmetic copies
    largest: int  # elements of the largest tensor
    layers: int
    hidden: int
    queries: int  # heads times head width
    keys: int  # key heads times head width
    mlp: int
    vocab: int
    style: str  # a key of SAVED in memory.py
    window: int  # tokens in the cache of a sliding-window layer; 0: no such layers
    sliding: int  # layers with a sliding window
    score_heads: int  # heads whose whole score matrix is stored (eager attention); else 0
    linears: tuple[tuple[str, int, int], ...] = ()  # name, inputs, outputs of each linear layer except the head
    small: int = 0  # elements in tensors below MIN_8BIT_ELEMENTS


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Build the model on the meta device and count. Raises UserError if it is not a causal language model."""
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
    return ModelSize(
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
class ModelStates:
    """What a run stores of a model over all ranks together: bytes, and counts of trained elements."""

    trained: int  # elements that the optimizer updates: all, or the adapter's
    trained_largest: int  # elements of the largest trained tensor
    weights: float  # bytes of all weights, frozen ones and the adapter included
    moments: float  # bytes of both moments
    copies: float  # bytes of the bf16 copies that autocast keeps for the backward
    adapter_tokens: int  # bytes per token that the backward stores beyond those of full training; may be negative


def model_states(cfg: Config, size: ModelSize) -> ModelStates:
    """Weights, moments and copies under full training, or with a LoRA adapter on a frozen model."""
    moments_in_8bit = cfg.optimizer != "adamw"
    fp32_moments = 2 * FP32_BYTES
    if not cfg.lora_r:
        moments = float(fp32_moments * size.parameters)
        if moments_in_8bit:
            moments = float(fp32_moments * size.small) + 2 * MOMENT_8BIT_BYTES * (size.parameters - size.small)
        copies = float(BF16_BYTES * size.products) if cfg.dtype == "bf16" else 0.0
        weights = float(FP32_BYTES * size.parameters)
        return ModelStates(size.parameters, size.largest, weights, moments, copies, 0)
    # the adapter: two matrices, inputs x r and r x outputs, for each target layer
    targets = cfg.lora_target_modules
    chosen = [
        (inputs, outputs)
        for name, inputs, outputs in size.linears
        if targets == "all-linear" or any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    sizes = [cfg.lora_r * width for pair in chosen for width in pair]
    trained, in_linears = sum(sizes), sum(inputs * outputs for _, inputs, outputs in size.linears)
    quantized = [moments_in_8bit and elements >= MIN_8BIT_ELEMENTS for elements in sizes]
    moments = sum(
        2 * elements * (MOMENT_8BIT_BYTES if in_8bit else FP32_BYTES)
        for elements, in_8bit in zip(sizes, quantized, strict=True)
    )
    # frozen linear layers may be stored in 4 bits or bf16; everything else stays fp32
    frozen_in_bf16 = cfg.dtype == "bf16" and not is_deepspeed(cfg)
    linear_bytes = NF4_BYTES if cfg.load_in_4bit else BF16_BYTES if frozen_in_bf16 else FP32_BYTES
    copied = size.products - (in_linears if frozen_in_bf16 or cfg.load_in_4bit else 0) + trained
    # activations: the adapter's inner products, less what frozen norms do not keep
    not_kept = (0, 0, 0) if recomputes_cheap(cfg) else FROZEN_NORMS[size.style][cfg.dtype]
    norms = zip(not_kept, (size.hidden, size.queries, size.keys), strict=True)
    adapter_inputs = len(chosen) * cfg.lora_r * (FP32_BYTES if cfg.dtype == "fp32" else BF16_BYTES)
    return ModelStates(
        trained=trained,
        trained_largest=max(sizes, default=0),
        weights=linear_bytes * in_linears + float(FP32_BYTES * (size.parameters - in_linears + trained)),
        moments=moments,
        copies=float(BF16_BYTES * copied) if cfg.dtype == "bf16" else 0.0,
        adapter_tokens=adapter_inputs - size.layers * sum(saved * width for saved, width in norms),
    )
