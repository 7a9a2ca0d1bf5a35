"""LoRA `all-linear` on mixtures of experts, hybrids and vision models: it trains, is saved, read back and merged.

Each model has random weights, and the adapter random matrices, so that equal logits cannot come from an adapter without
effect: `moved` is the control.
"""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models import lora as adapters
from grpo.models.checks import load_model
from grpo.models.loading import load_plain
from grpo.models.lora_checks import ADAPTER_CONFIG
from grpo.models.lora_files import write_adapter

CPU = torch.device("cpu")
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
COMMON = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
DEEPSEEK = dict(
    num_key_value_heads=4,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_group=1,
    topk_group=1,
)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
GEMMA3 = dict(
    text_config={**COMMON, "head_dim": 8},
    vision_config=VISION,
    mm_tokens_per_image=4,
    image_token_index=127,
    boi_token_index=126,
    eoi_token_index=125,
)
FAMILIES = {  # config, the names of the layers with an adapter
    "qwen3_moe": ({**COMMON, **EXPERTS, "head_dim": 8}, "k_proj o_proj q_proj v_proj"),
    "mixtral": ({**COMMON, **EXPERTS}, "k_proj o_proj q_proj v_proj"),
    "phimoe": ({**COMMON, **EXPERTS}, "k_proj o_proj q_proj v_proj"),
    "llama4_text": (
        {**COMMON, **EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    ),
    "deepseek_v3": ({**COMMON, **DEEPSEEK}, "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"),
    "qwen2_moe": (
        {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        "down_proj gate_proj k_proj o_proj q_proj shared_expert_gate up_proj v_proj",
    ),
    "jamba": (
        {**COMMON, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        "down_proj gate_proj in_proj k_proj o_proj out_proj q_proj up_proj v_proj x_proj",
    ),
    "bamba": (
        {**COMMON, **MAMBA, "attn_layer_indices": [1]},
        "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj",
    ),
    "mamba": (dict(vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2), "in_proj"),
    "falcon": (
        {**COMMON, "alibi": False, "new_decoder_architecture": False},
        "dense dense_4h_to_h dense_h_to_4h query_key_value",
    ),
    "bloom": (
        dict(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
        "dense dense_4h_to_h dense_h_to_4h query_key_value",
    ),
    "gemma3": (GEMMA3, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
}


def family(name):
    """A model with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**FAMILIES[name][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def gap(first, second):
    return float((first - second).abs().max())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_trained_saved_read_and_merged(name, tmp_path):
    family(name).save_pretrained(tmp_path / "base")
    before = logits(load_plain(str(tmp_path / "base"), CPU))
    cfg = Config(model=str(tmp_path / "base"), lora_r=2)
    model = adapters.load_lora(cfg, CPU)
    matrices = adapters.adapter_tensors(model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in matrices} == set(FAMILIES[name][1].split())
    assert not any("vision" in name or "projector" in name for name in matrices)
    assert torch.equal(before, logits(model)), "a new adapter changes nothing"
    # trained: every matrix B gets a gradient, in a forward that uses all blocks
    model(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
    for matrix_name, matrix in matrices.items():
        assert matrix.grad is not None and (".lora_A." in matrix_name or matrix.grad.abs().max() > 0), matrix_name
        matrix.data += torch.randn(matrix.shape, generator=torch.Generator().manual_seed(len(matrix_name))) * 0.05
    after = logits(model)
    assert gap(before, after) > 1e-2
    # saved and read back, by us, by plain peft, and merged
    (tmp_path / "adapter").mkdir()
    assert write_adapter(model.lora_config.to_dict(), matrices.items(), tmp_path / "adapter") is None
    opened = adapters.open_adapter(tmp_path / "adapter", CPU)
    assert torch.equal(logits(opened), after)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert gap(logits(theirs), after) < 1e-5
    adapters.merged(opened).save_pretrained(tmp_path / "merged")
    assert gap(logits(load_model(str(tmp_path / "merged"), CPU)), after) < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_control_an_adapter_on_a_layer_whose_weight_is_read_is_another_model_when_merged(tmp_path):
    """Jamba reads the weight of dt_proj: with an adapter there, B A would act after merging only."""
    family("jamba").save_pretrained(tmp_path / "base")
    model = adapters.start_lora(
        load_plain(str(tmp_path / "base"), CPU), Config(model="m", lora_r=2), stored=["dt_proj"]
    )
    before = logits(model)
    for matrix in adapters.adapter_tensors(model).values():
        matrix.data += 0.5
    assert torch.equal(logits(model), before)


def test_layers_left_out_are_named():
    with pytest.warns(UserWarning, match=r"PhimoeForCausalLM: no adapter on router \(it is no linear layer\); experts"):
        adapters.start_lora(family("phimoe"), Config(model="m", lora_r=2))


@pytest.mark.parametrize(
    "name, targets, reason",
    [
        ("qwen3_moe", ["q_proj", "down_proj"], "'down_proj' cannot get an adapter: the model has no such layer"),
        ("qwen3_moe", ["gate"], "'gate' cannot get an adapter: it is no linear layer"),
        ("phimoe", ["router"], "'router' cannot get an adapter: it is no linear layer"),
        ("deepseek_v3", ["gate_proj", "up_proj"], "'gate_proj' cannot get an adapter: peft converts its name"),
        ("jamba", ["dt_proj"], "'dt_proj' cannot get an adapter: the layer around it reads its weight"),
        ("mamba", ["out_proj"], "'out_proj' cannot get an adapter: the layer around it reads its weight"),
        ("gemma3", ["fc1"], "'fc1' cannot get an adapter: text does not pass through it"),
        ("qwen3_moe", ["lm_head"], "'lm_head' cannot get an adapter: it is the head or the embeddings"),
    ],
)
def test_named_layers_that_cannot_be_adapted_are_refused(name, targets, reason):
    with pytest.raises(UserError) as error:
        adapters.start_lora(family(name), Config(model="m", lora_r=2, lora_target_modules=targets))
    assert reason in str(error.value) and "Use all-linear, or names of its linear layers: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_on_both_towers_means_the_layers_of_the_text():
    model = adapters.start_lora(family("gemma3"), Config(model="m", lora_r=2, lora_target_modules=["q_proj"]))
    assert len(adapters.adapter_tensors(model)) == 4
    assert all(".language_model." in name for name in adapters.adapter_tensors(model))


def test_what_peft_adds_to_the_settings_is_refused():
    """Control of the choice: peft's own all-linear on Qwen3-MoE targets the experts' parameters."""
    with pytest.raises(UserError, match="peft sets target_parameters"):
        adapters._wrap(family("qwen3_moe"), "m", {"r": 2, "target_modules": "all-linear"})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_keeps_the_layers_of_its_checkpoint(tmp_path):
    """An older version put adapters onto the vision tower too: such a run goes on with them."""
    family("gemma3").save_pretrained(tmp_path / "base")
    cfg = Config(model=str(tmp_path / "base"), lora_r=2)
    base = load_plain(cfg.model, CPU)
    old = sorted({name.rpartition(".")[2] for name, _ in base.named_modules()} & {"q_proj", "fc1"})
    model = adapters.start_lora(base, cfg, stored=old)
    for matrix in adapters.adapter_tensors(model).values():
        matrix.data += 0.1
    (tmp_path / "checkpoint").mkdir()
    write_adapter(model.lora_config.to_dict(), adapters.adapter_tensors(model).items(), tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / ADAPTER_CONFIG).read_text())["target_modules"] == old
    resumed = adapters.load_lora(cfg, CPU, tmp_path / "checkpoint")
    assert adapters.adapter_tensors(resumed).keys() == adapters.adapter_tensors(model).keys()
    assert any("vision" in name for name in adapters.adapter_tensors(resumed))
