"""GGUF files in llama.cpp itself: logits, tokens, quantised kinds, greedy answers. Runs where llama-cpp-python is."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("llama_cpp")

from benchmarks.export_table import (
    CLOSE,
    NEW_TOKENS,
    LlamaCpp,
    config_of,
    divergences,
    logits_of,
    loss_of,
    material,
    ours,
    rounded,
    teach,
)
from grpo.export import gguf_file, gguf_model, gguf_tokenizer
from grpo.export.gguf_file import contents, quantize, tokenizer_problem, write_gguf
from grpo.models.gguf_weights import WORDS
from grpo.models.loading import load_tokenizer, prepare
from tests.export.test_gguf import KNOWN, tokenizer_with, words
from tests.support.launcher import PROJECT
from tests.support.tiny import tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, head of its own size": ("llama", {"head_dim": 32}),
    "llama, theta and eps": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, not tied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3, head of its own size": ("qwen3", {"head_dim": 96, "tie_word_embeddings": False}),
}


def random_model(architecture: str, vocab_size: int, **how) -> transformers.PreTrainedModel:
    """Weights wide enough that every part of the network moves the logits; norms and biases drawn too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(architecture, vocab_size, **how), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return rounded(prepare(model))


def in_llama_cpp(path: Path, ids: list[int]) -> np.ndarray:
    there = LlamaCpp(path)
    logits = there.logits(ids)
    there.close()
    return logits


def apart(model: transformers.PreTrainedModel, path: Path) -> float:
    """Largest difference of logits over a text of 90 tokens, in units of their spread."""
    ids = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    mine = logits_of(model)(ids)
    return float(np.abs(in_llama_cpp(path, ids) - mine).max() / mine.std())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_ours_for_every_variant_that_is_not_refused(name, tmp_path, monkeypatch):
    """Stored in f32, llama.cpp computes in f32 and agrees to rounding; in f16 it rounds activations to f16 too."""
    architecture, how = VARIANTS[name]
    model = random_model(architecture, 300, **how)
    gguf_model.check_architecture(model.config)
    write_gguf(tmp_path / "f16.gguf", "f16", model, tiny_tokenizer(), "name")
    assert 1e-5 < apart(model, tmp_path / "f16.gguf") < 0.05
    monkeypatch.setattr(gguf_file, "kind_for", lambda quant, shape: gguf_file.gguf.GGMLQuantizationType.F32)
    write_gguf(tmp_path / "f32.gguf", "f16", model, tiny_tokenizer(), "name")
    assert apart(model, tmp_path / "f32.gguf") < 1e-3


def test_a_llama_in_the_wrong_order_is_seen(tmp_path, monkeypatch):
    """The control of the test above."""
    model = random_model("llama", 300)
    monkeypatch.setattr(gguf_model, "_as_pairs", lambda name, values, config: values)
    write_gguf(tmp_path / "m.gguf", "f16", model, tiny_tokenizer(), "name")
    assert apart(model, tmp_path / "m.gguf") > 0.2


@pytest.mark.parametrize("name", [*KNOWN, "demo"])
def test_text_is_cut_into_our_tokens(name, tmp_path):
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base")) if name == "demo" else KNOWN[name]
    model = random_model("qwen3", max(300, len(tokenizer)))
    write_gguf(tmp_path / "m.gguf", "f16", model, tokenizer, "name")
    assert tokenizer_problem(tmp_path / "m.gguf", model, tokenizer, ["1 + 1 = 2"]) is None


@pytest.mark.parametrize(("name", "wrong"), [("qwen2", "gpt-2"), ("gpt-2", "qwen2"), ("smaug-bpe", "gpt-2")])
def test_a_wrong_way_to_cut_text_is_found_out(name, wrong, tmp_path, monkeypatch):
    """The control of the test above. The tokenizer has merges that show the difference."""
    tokenizer, model = KNOWN[name], random_model("qwen3", 300)
    monkeypatch.setattr(gguf_tokenizer, "pre_tokenizer_name", lambda state: wrong)
    write_gguf(tmp_path / "m.gguf", "f16", model, tokenizer, "name")
    assert "to llama.cpp" in (tokenizer_problem(tmp_path / "m.gguf", model, tokenizer, PROVOKING) or "")


PROVOKING = ["now\n####", "7, buys\n\n####", "pears.\n7", "She buys 3, eats\n 2"]


def test_llama_3s_words_are_taken_whole(tmp_path):
    tokenizer = tokenizer_with(words(WORDS % r"\p{N}{1,3}"))
    tokenizer.backend_tokenizer.model.ignore_merges = True
    model = random_model("llama", 300)
    write_gguf(tmp_path / "m.gguf", "f16", model, tokenizer, "name")
    assert gguf_file.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert tokenizer_problem(tmp_path / "m.gguf", model, tokenizer, PROVOKING) is None


def test_an_end_that_llama_cpp_does_not_know_is_found_out(tmp_path, monkeypatch):
    model, tokenizer = random_model("qwen3", 300), tiny_tokenizer()
    write_gguf(tmp_path / "m.gguf", "f16", model, tokenizer, "name")
    model.generation_config.eos_token_id = [0, 77]
    assert tokenizer_problem(tmp_path / "m.gguf", model, tokenizer, []) == (
        "token 77 ends an answer, and not to llama.cpp"
    )


def test_k_quants_keep_the_model(tmp_path):
    model = random_model("llama", 300)
    write_gguf(tmp_path / "f16.gguf", "f16", model, tiny_tokenizer(), "name")
    distances = []
    for quant in ("q5_k_m", "q4_k_m"):
        quantize(tmp_path / "f16.gguf", tmp_path / f"{quant}.gguf", quant)
        kinds = contents(tmp_path / f"{quant}.gguf")
        assert kinds == {f"{quant[:2]}_k": 13, "q6_k": 3}
        read = {
            t.name: gguf_file.gguf.dequantize(t.data, t.tensor_type)
            for t in gguf_file.GGUFReader(tmp_path / f"{quant}.gguf").tensors
        }
        own = dict(gguf_model.tensors(model))
        assert read.keys() == own.keys()
        errors = [np.square(read[n] - own[n]).mean() / np.square(own[n]).mean() for n in own if own[n].ndim > 1]
        distances.append(float(np.mean(errors)))
    assert 0 < distances[0] < distances[1] < 0.01


def test_what_llama_cpp_refuses_ends_in_one_line(tmp_path):
    (tmp_path / "f16.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(gguf_file.UserError, match=r"quant: llama.cpp could not write q4_k_m: "):
        quantize(tmp_path / "f16.gguf", tmp_path / "q.gguf", "q4_k_m")


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_trained_models_answer_alike(architecture, tmp_path):
    """20 prompts, 48 greedy tokens, f16: equal but where our two best logits are close. And perplexity."""
    torch.set_num_threads(1)
    model = teach(config_of(architecture, 374), steps=100)
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base"))
    write_gguf(tmp_path / "f16.gguf", "f16", model, tokenizer, "name")
    write_gguf(tmp_path / "q8_0.gguf", "q8_0", model, tokenizer, "name")
    prompts, texts = material()
    base = loss_of(logits_of(model), texts)
    exact = rounded(model)
    for quant, bound in (("f16", 1e-3), ("q8_0", 5e-3), ("q5_k_m", 0.02), ("q4_k_m", 0.05)):
        path = tmp_path / f"{quant}.gguf"
        if not path.exists():
            quantize(tmp_path / "f16.gguf", path, quant)
        there = LlamaCpp(path)
        assert abs(loss_of(there.logits, texts) - base) < bound, quant
        if quant == "f16":
            answers = [there.greedy(prompt) for prompt in prompts]
            assert len(answers) >= 20 and min(map(len, answers)) == NEW_TOKENS >= 32
            gaps = divergences(ours(exact, prompts), answers, prompts, logits_of(exact))
            assert all(gap < CLOSE for gap in gaps), gaps
        there.close()
