"""Folders of models that are not trained here: one line with what they are and what helps.

The control: a folder of a causal language model of the same library loads.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from grpo.errors import UserError
from grpo.models.checks import load_model, stop_token_ids, without_weights
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
CPU = torch.device("cpu")
OTHERS = {
    "vision and Llama": (
        lambda: transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT)),
        "LlavaForConditionalGeneration",
        ("reads images beside text", "save its language model and head as a LlamaForCausalLM"),
    ),
    "vision": (
        lambda: transformers.Qwen2VLConfig(text_config=TEXT),
        "Qwen2VLForConditionalGeneration",
        ("reads images beside text", "Use a text-only model of its family"),
    ),
    "audio": (
        lambda: transformers.Qwen2AudioConfig(text_config=transformers.Qwen2Config(**TEXT)),
        "Qwen2AudioForConditionalGeneration",
        ("reads audio beside text", "as a Qwen2ForCausalLM"),
    ),
    "encoder and decoder": (
        lambda: transformers.T5Config(vocab_size=300, d_model=32, num_layers=1),
        "T5ForConditionalGeneration",
        ("reads the prompt with an encoder", "Use a decoder-only model"),
    ),
    "encoder and decoder with a causal class": (
        lambda: transformers.BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1),
        "BartForConditionalGeneration",
        ("reads the prompt with an encoder", "Use a decoder-only model"),
    ),
    "vision alone": (lambda: transformers.ViTConfig(), "ViTModel", ("it is no causal language model",)),
    "newer": ({"model_type": "supernew"}, None, ("is of the type 'supernew', which transformers", "Install a newer")),
    "no type": ({"vocab_size": 300}, None, ("has no model_type",)),
}


def folder_of(path, config, architecture):
    path.mkdir()
    if not isinstance(config, dict):
        config.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, **({"architectures": [architecture]} if architecture else {})})
    )
    save_file({"model.x.weight": torch.zeros(300, 300)}, path / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_are_refused_with_what_helps(tmp_path, name):
    make, architecture, said = OTHERS[name]
    folder = folder_of(tmp_path / "model", make if isinstance(make, dict) else make(), architecture)
    with pytest.raises(UserError) as refused:
        load_model(folder, CPU)
    line = str(refused.value)
    assert all(part in line for part in (*said, architecture or "")), line
    assert "\n" not in line and "Give a folder with safetensors weights" not in line and len(line) < 400


def test_a_causal_language_model_loads(tmp_path):
    """The control; and its settings alone give the same stop tokens as the loaded model."""
    folder = str(save_tiny(tmp_path / "model", "llama"))
    model = load_model(folder, CPU)
    model.generation_config.eos_token_id = [0, 7]
    model.generation_config.save_pretrained(folder)
    assert stop_token_ids(model, tiny_tokenizer()) == {0, 7}
    assert stop_token_ids(without_weights(folder), tiny_tokenizer()) == {0, 7}  # type: ignore[arg-type]
    (tmp_path / "model" / "generation_config.json").unlink()
    assert stop_token_ids(without_weights(folder), tiny_tokenizer()) == {0}
    assert stop_token_ids(tiny_model("llama"), tiny_tokenizer()) == {0}
