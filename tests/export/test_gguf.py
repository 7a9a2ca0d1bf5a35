"""GGUF files, read back tensor by tensor and key by key with gguf's own reader; and what is refused, by name."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.errors import UserError
from grpo.export import gguf_file
from grpo.export.gguf_file import check_quants, write_gguf
from grpo.export.gguf_model import check_architecture, head_dim
from grpo.export.gguf_tokenizer import check_tokenizer, pre_tokenizer_name
from grpo.models.gguf_weights import WORDS
from tests.support.tiny import EOS, tiny_config, tiny_model, tiny_tokenizer

SUPPORTED = ("llama", "qwen2", "qwen3")
PLACES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def place_of(name: str) -> str:
    """llama.cpp's name of a weight, spelled out here a second time."""
    parts = name.split(".")
    layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{layer}{PLACES[parts[-2]]}.{parts[-1]}"


def in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as 0, d/2, 1, d/2 + 1, ..., written with indices here."""
    d = len(values) // heads
    return values[[h * d + i // 2 + i % 2 * (d // 2) for h in range(heads) for i in range(d)]]


def wanted(model) -> dict[str, np.ndarray]:
    """Every tensor that belongs into the file."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            values = in_pairs(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            found[place_of(name)] = values
    return found


def settings_of(reader: GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def tiny(architecture: str):
    """A random model, with biases that are not zero."""
    model = tiny_model(architecture, len(tiny_tokenizer()))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(len(parameter), generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_every_tensor_and_setting_is_written(architecture, tmp_path):
    model, tokenizer = tiny(architecture), tiny_tokenizer()
    write_gguf(tmp_path / "m.gguf", "f16", model, tokenizer, "name")
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = wanted(model)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        vector = values.ndim == 1
        assert tensors[name].tensor_type == (GGMLQuantizationType.F32 if vector else GGMLQuantizationType.F16), name
        assert np.array_equal(tensors[name].data, values if vector else values.astype(np.float16)), name
    fields, config = settings_of(reader), model.config
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items() if key.startswith(architecture)}
    assert own == {
        "vocab_size": 300,
        "context_length": 256,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
    }
    assert fields["general.architecture"] == architecture and fields["general.file_type"] == 1


def test_tokens_merges_ends_and_template_are_written(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])  # not special: text that a user may write
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = tiny_model("qwen3", 320)
    model.generation_config.eos_token_id = [1, 0]
    write_gguf(tmp_path / "m.gguf", "q8_0", model, tokenizer, "name")
    fields = settings_of(GGUFReader(tmp_path / "m.gguf"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    assert fields["tokenizer.ggml.tokens"][: len(ids)] == sorted(ids, key=lambda token: ids[token])
    assert fields["tokenizer.ggml.tokens"][len(ids) :] == [f"[PAD{i}]" for i in range(len(ids), 320)]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:2] == [TokenType.CONTROL] * 2 and set(kinds[2:300]) == {TokenType.NORMAL}
    assert kinds[ids["<think>"]] == TokenType.USER_DEFINED and set(kinds[len(ids) :]) == {TokenType.UNUSED}
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in state["model"]["merges"]]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (0, 1)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_the_templates_end_of_a_turn_ends_an_answer_too(tmp_path):
    """Without it (the control) the file names the model's own token alone."""
    for end_of_turn, ends in ((None, (0, None)), ("<|im_end|>", (0, 1))):
        write_gguf(tmp_path / "m.gguf", "f16", tiny_model("qwen3"), tiny_tokenizer(), "name", end_of_turn)
        fields = settings_of(GGUFReader(tmp_path / "m.gguf"))
        assert tuple(fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")) == ends


def test_q8_0_is_within_half_a_step_of_its_block(tmp_path):
    model = tiny("llama")
    write_gguf(tmp_path / "m.gguf", "q8_0", model, tiny_tokenizer(), "name")
    expected = wanted(model)
    kinds = set()
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        values = expected[tensor.name]
        read = gguf.dequantize(tensor.data, tensor.tensor_type)
        kinds.add((tensor.tensor_type.name, values.shape[-1]))
        if tensor.tensor_type == GGMLQuantizationType.Q8_0:
            blocks = values.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            assert (np.abs(read.reshape(-1, 32) - blocks) <= 0.5 * step + 127 * step * 2.0**-11 + 1e-7).all()
    # rows of 48 do not divide into blocks of 32
    assert kinds == {("Q8_0", 32), ("F16", 48), ("F32", 32)}


def test_llama_3_frequencies_are_written_as_factors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = tiny_config("llama")
    config.rope_parameters = rope
    model = transformers.LlamaForCausalLM(config)
    write_gguf(tmp_path / "m.gguf", "f16", model, tiny_tokenizer(), "name")
    [factors] = [t.data for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)


# --- refusals


def variant(architecture: str, **changes):
    config = tiny_config(architecture)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
MOE = transformers.Qwen3MoeConfig(num_hidden_layers=2)
REFUSED = [
    ("'gemma2'", tiny_config("gemma2")),
    ("'gemma3_text'", tiny_config("gemma3")),
    ("'gpt2'", tiny_config("gpt2")),
    ("'qwen3_moe'", MOE),
    ("rope_type 'yarn'", variant("qwen2", rope_parameters=YARN)),
    ("rope_type 'linear'", variant("llama", rope_parameters={**YARN, "rope_type": "linear"})),
    ("hidden_act 'gelu'", variant("llama", hidden_act="gelu")),
    ("attention_bias", variant("qwen3", attention_bias=True)),
    ("layer_types", variant("qwen2", layer_types=["full_attention", "sliding_attention"])),
    ("head_dim 16", variant("qwen2", head_dim=16)),
    (
        "partial_rotary_factor 0.5",
        variant("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ),
]


@pytest.mark.parametrize(("named", "config"), REFUSED, ids=[named for named, _ in REFUSED])
def test_architectures_that_were_not_checked_are_refused_by_name(named, config):
    with pytest.raises(UserError, match=r"^to: gguf cannot write") as refused:
        check_architecture(config)
    assert named in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_the_others_are_not(architecture):
    check_architecture(tiny_config(architecture))
    assert head_dim(tiny_config(architecture)) == 8


def tokenizer_with(pre=None, normalizer=None, model=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text so."""
    plain = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = Tokenizer(model or models.BPE(plain["vocab"], [tuple(merge) for merge in plain["merges"]]))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def words(pattern: str):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


STRANGE = {
    "Split": tokenizer_with(
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)])
    ),
    "two digits": tokenizer_with(words(WORDS % r"\p{N}{1,2}")),
    "ByteLevel": tokenizer_with(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Lowercase": tokenizer_with(normalizer=normalizers.Lowercase()),
    "WordLevel": tokenizer_with(model=models.WordLevel({EOS: 0, "a": 1}, EOS)),
    "byte fallback": tokenizer_with(model=models.BPE({EOS: 0, "a": 1, "b": 2}, [], byte_fallback=True)),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tokenizers_without_a_like_are_refused(kind):
    with pytest.raises(UserError, match=r"^to: gguf cannot write this tokenizer") as refused:
        check_tokenizer(STRANGE[kind])
    assert (kind if kind != "two digits" else "{1,2}") in str(refused.value)


def test_a_token_that_eats_spaces_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([transformers.AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match=r"its token '<mask>' has lstrip"):
        check_tokenizer(tokenizer)


KNOWN = {
    "gpt-2": tokenizer_with(),
    "qwen2": tokenizer_with(words(WORDS % r"\p{N}"), normalizers.NFC()),
    "smaug-bpe": tokenizer_with(words(WORDS % r"\p{N}{1,3}")),
    "smollm": tokenizer_with(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
}


@pytest.mark.parametrize("name", KNOWN)
def test_ways_to_cut_text_are_known_by_llama_cpps_names(name):
    assert pre_tokenizer_name(check_tokenizer(KNOWN[name])) == name


def test_k_quants_without_llama_cpp_are_refused_and_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gguf_file, "has_llama_cpp", lambda: False)
    with pytest.raises(UserError, match=r"llama-cpp-python, which is not installed. pip install .*\[gguf\]"):
        check_quants(["f16", "q4_k_m"])
    check_quants(["f16", "q8_0"])


def test_without_gguf_the_method_is_refused(monkeypatch, capsys, tmp_path):
    from grpo.export.command import check_gguf

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else sys.modules[name].__spec__)
    with pytest.raises(UserError, match="needs the package gguf"):
        check_gguf(None, "f16")
