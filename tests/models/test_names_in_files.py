"""Weights under the names of a model's files, one at a time, against what save_pretrained writes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.core_model_loading import Chunk, WeightConverter

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.lora import start_lora
from grpo.models.lora_merged import merged_weights
from grpo.models.names_in_files import NamesInFiles
from tests.support.tiny import ARCHITECTURES, tiny_config, tiny_model


def mixtral():
    """Its files have other names for experts and routers."""
    config = MixtralConfig(**tiny_config("llama").to_diff_dict() | {"model_type": "mixtral", "num_local_experts": 4})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("loaded", [False, True], ids=["from its config", "from its files"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_moe", "mixtral"])
def test_they_are_those_of_the_files(architecture, loaded, tmp_path):
    """Also where memory has others: without a conversion (the control) experts are missing."""
    model = mixtral() if architecture == "mixtral" else tiny_model(architecture)
    model.save_pretrained(tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    ours = dict(NamesInFiles(model)(model.named_parameters()))
    assert ours.keys() == files.keys()
    assert all(torch.equal(ours[name], value) for name, value in files.items())
    assert (dict(model.named_parameters()).keys() == files.keys()) == (architecture not in ("qwen3_moe", "mixtral"))


def test_one_layer_of_experts_at_a_time():
    """Where weights are sharded, a whole layer is in memory, and the next one is made when it has been read."""
    model, asked = tiny_model("qwen3_moe"), []

    def weights():
        for name, value in model.named_parameters():
            asked.append(name)
            yield name, value

    for name, _ in NamesInFiles(model)(weights()):
        assert name.split(".experts.")[0] in asked[-1]
    assert asked == [name for name, _ in model.named_parameters()]


def test_an_adapter_merged_into_a_mixture_of_experts(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    model = start_lora(model, Config(model="m", data="d", rewards={"r": 1.0}, lora_r=4))
    assert dict(NamesInFiles(model)(merged_weights(model))).keys() == names


def test_weights_of_several_parts_are_refused():
    """Files that hold gate and up as one weight, where memory has two; the same conversion of one weight is fine."""
    model = tiny_model("llama")
    two = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.gate_up.weight", two, operations=[Chunk(dim=0)])]
    with pytest.raises(UserError, match="made of several in memory"):
        NamesInFiles(model)
