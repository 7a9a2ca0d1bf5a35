"""GGUF: settings and tensors of the architectures that were checked against llama.cpp; the others are refused by name.

llama.cpp builds the network from the architecture's name and a few numbers, and ignores other settings of transformers.
So every setting that changes the computation is either written, or must have the value that llama.cpp assumes.
"""

from collections.abc import Iterator

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedConfig, PreTrainedModel

from grpo.errors import UserError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",)}
LARGEST_F16 = 65504.0


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse a model that llama.cpp would compute differently, or that was never checked. Raises UserError."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"to: gguf cannot write the architecture {kind!r}, allowed: {', '.join(sorted(ARCHITECTURES))}. "
            "Use --to merged_16bit."
        )
    rope = config.rope_parameters or {}
    expected = {
        "hidden_act": ("silu",),
        "rope_type": ROPES[kind],
        "partial_rotary_factor": (None, 1, 1.0),
        "layer_types": (None, ["full_attention"] * config.num_hidden_layers),
        "attention_bias": (None, False, True) if kind == "llama" else (None, False),
    }
    if kind == "qwen2":
        expected["head_dim"] = (None, config.hidden_size // config.num_attention_heads)
    for key, allowed in expected.items():
        value = rope.get(key) if key in rope else getattr(config, key, None)
        if key == "rope_type" and value is None:
            value = "default"
        if value not in allowed:
            raise UserError(
                f"to: gguf cannot write a {kind} model with {key} {repr(value)[:80]}. Use --to merged_16bit."
            )


def head_dim(config: PreTrainedConfig) -> int:
    """Dimension of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_settings(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Write the settings from which llama.cpp builds the network."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """The weights by llama.cpp's names, fp32, in the model's order. Raises UserError for one without a name there."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    if _scaled(config):
        yield "rope_freqs.weight", _frequency_factors(model)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # without an output matrix llama.cpp uses the embedding
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise UserError(f"to: gguf has no name for the {config.model_type} weight {name!r}. Use --to merged_16bit.")
        values = tensor.detach().float().numpy()
        if config.model_type == "llama":
            values = _as_pairs(name, values, config)
        yield own, values


def _as_pairs(name: str, values: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """Rows of Llama's q and k in llama.cpp's order, which rotates the pairs (2i, 2i + 1) of a head.

    transformers rotates the pairs (i, i + d/2), as llama.cpp does for the other architectures.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _scaled(config: PreTrainedConfig) -> bool:
    return config.rope_parameters.get("rope_type", "default") == "llama3"


def _frequency_factors(model: PreTrainedModel) -> np.ndarray:
    """[d/2] fp32: the unscaled rope frequencies divided by those of transformers."""
    dim = head_dim(model.config)
    theta = float(model.config.rope_parameters["rope_theta"])
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    own = model.get_decoder().rotary_emb.inv_freq.double()
    return (plain / own).float().numpy()


def kind_for(quant: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The tensor type: fp32 for vectors, as llama.cpp requires; the requested one for matrices.

    For q8_0, matrices whose row length is not a multiple of its block of 32 are stored in f16, as llama.cpp's own
    quantiser does.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if quant == "q8_0" and shape[-1] % 32 == 0 else GGMLQuantizationType.F16


def encoded(name: str, values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The tensor's values as bytes of that type. Raises UserError where f16 cannot hold them."""
    if kind == GGMLQuantizationType.F16 and np.abs(values).max() > LARGEST_F16:
        raise UserError(f"to: {name} holds values beyond f16's {LARGEST_F16:.0f}. Use --to merged_16bit.")
    return gguf.quantize(np.ascontiguousarray(values), kind)
