"""The planner: counts against built models, formulas by hand, how they scale, advice that holds, one-line errors."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.settings import Config
from grpo.forward.precision import arithmetic
from grpo.forward.recomputed import recompute_cheap_activations
from grpo.models.loading import prepare
from grpo.plan.command import GB, advise, main
from grpo.plan.memory import MEMORY_PHASES, activation_bytes, draw_bytes, estimate, head_bytes, kv_bytes, work_of
from grpo.plan.model_size import model_size
from grpo.rollout.sampling import Sampling
from tests.support.tiny import ARCHITECTURES, tiny_config, tiny_model

LARGE = {"vocab_size": 100_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
ZERO3 = Config(model="x", backend="deepspeed", zero_stage=3, batch_size=64, micro_batch_tokens=1024)


def large_config():
    """A Qwen3 of half a billion parameters, never built with storage."""
    config = tiny_config("qwen3")
    for name, value in LARGE.items():
        setattr(config, name, value)
    config.layer_types = ["full_attention"] * LARGE["num_hidden_layers"]
    return config


def row(found, name):
    return next(r.bytes for r in found.memory if r.name == name)


# --- counted, and by hand


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_those_of_the_built_model(architecture):
    model = tiny_model(architecture)
    size = model_size(tiny_config(architecture))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.largest == max(p.numel() for p in model.parameters())
    assert size.vocab == model.get_output_embeddings().weight.shape[0]


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_what_autograd_keeps(architecture, dtype, recomputes):
    """The bytes of one more layer, as saved for the backward, bf16 copies of weights left out."""
    rows, tokens = 2, 48

    def saved(layers: int) -> int:
        config = tiny_config(architecture)
        config.num_hidden_layers = layers
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * layers
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()
        if recomputes:
            recompute_cheap_activations(model)
        shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) not in shapes:  # neither weights nor their bf16 copies
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), arithmetic(dtype, torch.device("cpu")):
            model.base_model(input_ids=torch.arange(rows * tokens).view(rows, tokens) % 300, use_cache=False)
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    size = model_size(tiny_config(architecture))
    more = saved(4) - saved(3)
    three = dataclasses.replace(size, layers=3)
    four = dataclasses.replace(size, layers=4)
    estimated = [activation_bytes(s, rows * tokens, tokens, dtype, recomputes, False) for s in (three, four)]
    assert estimated[1] - estimated[0] == pytest.approx(more, rel=0.1)


def test_one_example_by_hand():
    """Qwen2: hidden 32, mlp 48, 2 layers, 4 heads of 8, 2 key heads, 300 words; 100 + 28 tokens, 4 rows."""
    cfg = Config(
        batch_size=2,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_prompt_length=100,
        max_generate_length=28,
        micro_batch_tokens=512,
        rollout_chunk_rows=4,
        device="cpu",
    )
    found = estimate(cfg, tiny_config("qwen2"), 2)
    attention = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32
    parameters = 300 * 32 + 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32
    assert found.size.parameters == parameters
    assert row(found, "weights") == row(found, "gradients, all") == 4 * parameters
    assert row(found, "moments") == 8 * parameters
    assert row(found, "KV cache") == 4 * 128 * 4 * (2 * 2 * 16) + 4 * 128 * 4 * 16  # one tensor twice
    tokens = 4 * 127
    assert row(found, "activations") == 2 * tokens * (16 * 32 + 8 * 32 + 8 * 16 + 8 * 48) + 3 * tokens * 32 * 4
    assert row(found, "logits block") == 4 * (4 * 28 * 300 * 4)
    assert row(found, "drawing a token") == 4 * 300 * 12
    assert [r.bytes for r in found.traffic] == [4 * parameters, 4 * 28 * 8 / 2]
    assert work_of(cfg, 2).micro_batches == 1


def test_peak_is_the_worst_phase_and_rows_can_be_left_out():
    found = estimate(ZERO3, large_config(), 8)
    assert found.peak() == max(found.at(phase) for phase in MEMORY_PHASES) == found.at(found.worst)
    assert found.at("rollout", without="rollout copy") == found.at("rollout") - 4 * found.size.parameters


# --- how it scales


def test_what_zero_shards_falls_with_the_ranks():
    sharded = ("weights", "master weights", "moments", "gradients")
    for stage, names in {1: sharded[1:3], 2: sharded[1:], 3: sharded}.items():
        cfg = dataclasses.replace(ZERO3, zero_stage=stage)
        at = {ranks: estimate(cfg, large_config(), ranks) for ranks in (2, 64)}
        for name in sharded:
            ratio = row(at[2], name) / row(at[64], name)
            assert ratio == pytest.approx(32 if name in names else 1, rel=0.01), (stage, name)


def test_more_rows_longer_texts_more_memory():
    size = model_size(tiny_config("qwen3"))
    assert kv_bytes(size, 64, 128, "fp32") == 2 * kv_bytes(size, 32, 128, "fp32")
    assert draw_bytes(size, 64, Sampling()) == 2 * draw_bytes(size, 32, Sampling())
    assert activation_bytes(size, 512, 128, "fp32", False, True) < activation_bytes(size, 512, 128, "fp32", True, False)
    assert head_bytes(size, 10**6, 1, False) == 4 * 2**20 < head_bytes(size, 10**6, 2, False)


def test_sliding_layers_keep_their_window():
    """gemma3: one of two layers keeps 8 tokens."""
    size = model_size(tiny_config("gemma3"))
    assert kv_bytes(size, 1, 108, "fp32") == (2 * (108 + 8) + 108) * 16 * 4


def test_zero_3_moves_weights_with_every_micro_batch():
    few, many = (estimate(dataclasses.replace(ZERO3, num_iterations=n), large_config(), 8) for n in (1, 3))
    gathers = [next(r.bytes for r in found.traffic if "forward" in r.name) for found in (few, many)]
    assert gathers[1] == 3 * gathers[0] > 0
    assert sum(r.bytes for r in estimate(ZERO3, large_config(), 1).traffic) == 0


# --- advice


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.35])
@pytest.mark.parametrize(
    "cfg",
    [
        Config(model="x", batch_size=64, micro_batch_tokens=8192, rollout_chunk_rows=64),
        Config(model="x", batch_size=64, micro_batch_tokens=8192, backend="deepspeed", zero_stage=2, dtype="bf16"),
        Config(model="x", batch_size=64, rollout_chunk_rows=512, max_generate_length=2048),
    ],
    ids=["ddp", "zero", "long"],
)
def test_advice_makes_it_fit_or_there_is_none(cfg, share):
    limit = share * estimate(cfg, large_config(), 8).peak()
    remedy = advise(cfg, model_size(large_config()), 8, limit)
    if share >= 0.7:
        assert remedy
    if remedy:
        values = dict(remedy)
        if "zero_stage" in values:
            values["backend"] = "deepspeed"
        assert estimate(dataclasses.replace(cfg, **values), large_config(), 8).peak() <= limit


# --- the command


@pytest.fixture
def folder(tmp_path):
    """A model of which only the config is there."""
    large_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(folder, *more):
    return ["--model", str(folder), "--data", "x.jsonl", "--rewards", '{"digit_reward": 1.0}', *more]


def test_the_command_reads_the_config_alone(folder, capsys):
    assert sorted(f.name for f in folder.iterdir()) == ["config.json"]
    assert main(arguments(folder, "--gpus", "8", "--gpu_memory=80")) == 0
    printed = capsys.readouterr().out
    assert "FITS" in printed and "0.305 billion" in printed.splitlines()[0] and "all-reduce" in printed


def test_the_command_says_what_does_not_fit_and_what_would(folder, capsys):
    zero = ("--backend", "deepspeed", "--zero_stage", "3")
    assert main(arguments(folder, "--gpus=8", "--gpu_memory", "1", *zero)) == 0
    printed = capsys.readouterr().out
    copy = row(estimate(ZERO3, large_config(), 8), "rollout copy") / GB
    assert f"rollout copy alone: {copy:.1f} GB, more than one GPU has" in printed and "No setting" in printed
    assert main(arguments(folder, "--gpus=8", "--gpu_memory", "4")) == 0
    assert "It fits with --" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, names",
    [
        (("--gpus", "0"), "gpus"),
        (("--gpus", "many"), "gpus"),
        (("--gpu_memory", "-1"), "gpu_memory"),
        (("--gpus", "2", "--backend", "single"), "backend"),
        (("--no_such_key", "1"), "no_such_key"),
        (("--model", "./nowhere"), "model"),
        (("--gpus",), "gpus"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, capsys, wrong, names):
    assert main([*arguments(folder), *wrong]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("error: ") and names in printed


def test_a_config_that_is_no_language_model_is_one_line(folder, capsys):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert main(arguments(folder)) == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize("server", [None, "http://a:1"])
def test_vllm_holds_its_own_cache_and_gets_the_weights(folder, server):
    """A server beside the trainer shares its device; one elsewhere does not. Control: the native engine."""
    config = AutoConfig.from_pretrained(folder)
    settings = {"model": str(folder), "dtype": "bf16"}
    native = estimate(Config(**settings), config, 1)
    served = estimate(Config(**settings, rollout_engine="vllm", rollout_server=server), config, 1)
    names = {entry.name for entry in served.memory}
    assert ("vLLM's server" in names) == (server is None) and "KV cache" not in names
    assert "KV cache" in {entry.name for entry in native.memory}
    [sent] = [entry.bytes for entry in served.traffic if "vLLM" in entry.name]
    assert sent == 2 * served.size.parameters and len(served.traffic) == len(native.traffic) + 1
