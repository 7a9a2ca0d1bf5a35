"""Tiny random models of every type in transformers' table of causal language models.

A type's own default config is shrunk by the names of its settings; `SPECIAL` holds what that rule does not find. Types
whose config cannot be made here (a package is missing, say) raise what transformers raises.
"""

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 300
WIDTH, INNER, HEADS, LAYERS = 32, 48, 4, 2


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SMALL = {  # settings of configs -> their value here
    **_all("vocab_size vocab_size_per_layer_input", VOCABULARY),
    **_all("hidden_size d_model n_embd dim embedding_size emb_dim lru_width", WIDTH),
    **_all("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size d_inner mlp_hidden_size", INNER),
    **_all("decoder_ffn_dim encoder_ffn_dim", INNER),
    **_all("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 24),
    **_all("num_hidden_layers n_layer n_layers num_layers", LAYERS),
    **_all("decoder_layers encoder_layers num_decoder_layers", LAYERS),
    **_all("num_attention_heads n_head n_heads num_heads", HEADS),
    **_all("decoder_attention_heads encoder_attention_heads num_decoder_attention_heads", HEADS),
    **_all("linear_num_value_heads mamba_num_heads mamba_dt_rank time_step_rank", HEADS),
    **_all("num_key_value_heads num_kv_heads num_global_key_value_heads linear_num_key_heads", 2),
    **_all("type_vocab_size mamba_expand num_experts_per_tok top_k_experts moe_k moe_topk", 2),
    **_all("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_all("n_group topk_group n_shared_experts first_k_dense_replace", 1),
    **_all("head_dim d_head global_head_dim linear_key_head_dim linear_value_head_dim rotary_dim", 8),
    **_all("mamba_d_state mamba_d_head mamba_n_heads mamba_head_dim state_size ssm_state_size", 8),
    **_all("qk_nope_head_dim qk_rope_head_dim hidden_size_per_layer_input", 8),
    **_all("sliding_window attention_window_size window_size local_window", 8),
    **_all("attention_chunk_size chunk_size mamba_chunk_size", 8),
    **_all("max_position_embeddings n_positions seq_length max_seq_len n_ctx", 256),
    **_all("pad_token_id bos_token_id eos_token_id", 0),
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 12, "mamba_d_ssm": 64},
}
OPTIONAL = {"sliding_window", "attention_chunk_size", "top_k_experts", "num_experts"}  # None by default: stays None
PATTERNS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
LINEAR = {"linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1, "num_experts_per_token": 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
GEMMA3N = SHARED_KV | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR | HYBRID | {"qk_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": WIDTH, "num_key_value_heads": HEADS},
        "decoder_config": {"hidden_size_global": WIDTH, "num_key_value_heads": HEADS},
        "global_config": {"num_key_value_heads": HEADS},
        "patcher_config": {"num_key_value_heads": HEADS},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "emu3": {"text_config": {"vocab_size": VOCABULARY}},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": SHARED_KV},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": LINEAR | HYBRID | {"qk_head_dim": 16},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {
        "n_groups": 2,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 24,
    },
    "phi4_multimodal": {"eos_token_id": 3},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": VOCABULARY,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
        "ple_embed_dim": WIDTH,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "feed_forward_size": INNER,
        "attention_head_size": 8,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "chunk_size": 64},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"], "router_hidden_size": 16},
}
SPREAD = {"ctrl": 8.0, "marian": 1.2, "pegasus": 1.2}  # with 2.5, greedy tokens hardly vary
SPECIAL["qwen4_exp"] = {"text_config": SPECIAL["qwen4_exp_text"]}


def small_settings(cls: type[PreTrainedConfig], special: dict[str, Any]) -> dict[str, Any]:
    """Of a config class, the settings to change from their defaults; nested configs likewise."""
    default = cls()
    nested = {
        name: type(getattr(default, name))
        for name in getattr(cls, "sub_configs", None) or {}
        if isinstance(getattr(default, name, None), PreTrainedConfig)
    }
    settings = {name: value for name, value in default.to_dict().items() if name not in nested}
    found = {name: _small(name, value) for name, value in settings.items() if _shrinks(name, value)}
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        found["num_key_value_heads"] = HEADS  # multi-head latent attention does not group its heads
    layers = special.get("num_hidden_layers", LAYERS)
    for name in PATTERNS:
        if isinstance(value := settings.get(name), list):
            kinds = list(dict.fromkeys(value)) if name != "no_rope_layers" else value
            found[name] = (kinds * layers)[: max(layers, len(kinds)) if name == "layer_types" else layers]
    found |= {name: value for name, value in special.items() if name not in nested}
    if isinstance(found.get("layer_types"), list) and "num_hidden_layers" in settings:
        found["num_hidden_layers"] = count = len(found["layer_types"])
        if isinstance(kinds := found.get("mlp_layer_types"), list):
            found["mlp_layer_types"] = (kinds * count)[:count]
    return found | {name: small_settings(sub, special.get(name, {})) for name, sub in nested.items()}


def _shrinks(name: str, value: Any) -> bool:
    if name == "tie_word_embeddings":  # tied random embeddings repeat the last token for ever
        return True
    if name not in SMALL or isinstance(value, (bool, dict)):
        return False
    return (
        isinstance(value, (int, float))
        or (value is None and name not in OPTIONAL and "token_id" not in name)
        or (isinstance(value, list) and "token_id" in name)
    )


def _small(name: str, value: Any) -> Any:
    return False if name == "tie_word_embeddings" else SMALL[name]


def zoo_model(model_type: str) -> PreTrainedModel:
    """A tiny random model of this type, its matrices multiplied so that tokens differ in probability."""
    cls = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = cls(**small_settings(cls, SPECIAL.get(model_type, {})))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(SPREAD.get(model_type, 2.5))
    return model.eval()
