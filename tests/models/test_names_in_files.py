"""Weights under the names of a model's files, one at a time, against what save_pretrained writes."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

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
    """One that changes nothing yet: the values of the files."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    model = start_lora(model, Config(model="m", data="d", rewards={"r": 1.0}, lora_r=4))
    ours = dict(NamesInFiles(model)(merged_weights(model)))
    assert ours.keys() == files.keys() and all(torch.equal(ours[name], value) for name, value in files.items())


def test_what_files_hold_beside_weights(tmp_path):
    """The bias of DeepSeek-V3's routers is no parameter, and files have it."""
    common = tiny_config("llama").to_diff_dict() | {"model_type": "deepseek_v3", "num_key_value_heads": 4}
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16)
    heads = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**common, **experts, **heads, first_k_dense_replace=1))
    for buffer in model.buffers():
        buffer.add_(0.5)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    ours = dict(NamesInFiles(model)(model.named_parameters()))
    assert any("e_score_correction_bias" in name for name in files)
    assert ours.keys() == files.keys() and all(torch.equal(ours[name], value) for name, value in files.items())


def test_weights_of_several_parts_are_refused():
    """Files that hold gate and up as one weight, where memory has two; a conversion of one into two (the control)."""
    for conversion in (
        WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
        WeightConverter(["mlp.a.weight", "mlp.b.weight"], "mlp.gate_proj.weight", [Concatenate(dim=0)]),
    ):
        model = tiny_model("llama")
        model._weight_conversions = [conversion]
        refused = len(conversion.target_patterns) == 2
        with pytest.raises(UserError, match="one at a time") if refused else nullcontext():
            NamesInFiles(model)
