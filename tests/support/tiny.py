"""Tiny random models of six architectures, and a tokenizer, made here: nothing is downloaded."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grpo.models.loading import prepare

ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma2", "gemma3", "gpt2")
EOS = "<|endoftext|>"
CORPUS = [
    "Mia has 7 pears. She buys 3, eats 2. How many pears does she have now?\n7, buys 3: 10.\n#### 10",
    "小明有10个苹果",
]


def tiny_tokenizer(vocab_size: int = 300, pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE; pad: whether it has a pad token, which is eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, **({"pad_token": EOS} if pad else {}))


def tiny_config(architecture: str, vocab_size: int = 300) -> transformers.PreTrainedConfig:
    """Two layers, hidden 32; the windows of the Gemmas are 8 tokens, so that prompts are longer."""
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
        )
    common = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    if architecture == "qwen2":
        return transformers.Qwen2Config(**common, tie_word_embeddings=True)
    if architecture == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=8, tie_word_embeddings=True)
    if architecture == "qwen3_moe":
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        return transformers.Qwen3MoeConfig(**common, **experts, head_dim=8)
    if architecture == "llama":
        return transformers.LlamaConfig(**common, tie_word_embeddings=False)
    if architecture == "gemma2":
        return transformers.Gemma2Config(
            **common,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    if architecture == "gemma3":
        return transformers.Gemma3TextConfig(
            **common,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    raise ValueError(architecture)


def tiny_model(architecture: str, vocab_size: int = 300, seed: int = 0, spread: float = 4.0) -> PreTrainedModel:
    """A random model whose logits are multiplied, so that tokens differ in probability."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab_size), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
    return prepare(model)


def save_tiny(folder: Path, architecture: str = "qwen3", **how) -> Path:
    """A model folder as save_pretrained writes it."""
    tokenizer = tiny_tokenizer()
    tiny_model(architecture, len(tokenizer), **how).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
