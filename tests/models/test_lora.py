"""LoRA from a run's start to its adapter's reader: what is trained, what is written, what is refused.

tests/models/test_lora_invariance.py holds backends and ranks against each other.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grpo.checkpoints import background as saving
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints import resume
from grpo.checkpoints.manifest import tree_sha256, verify
from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.data.recipe import Recipe, recipe_text
from grpo.errors import UserError
from grpo.evaluate.ask import CheckpointModel
from grpo.forward.logprobs import Scorer
from grpo.models import lora as adapters
from grpo.models import lora_files as adapter_files
from grpo.models.checks import load_model
from grpo.models.lora_checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import World
from grpo.training.load_policy import load_policy, load_trained
from grpo.training.policy import Policy
from tests.support.launcher import fork_script
from tests.support.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
QUESTIONS = [
    f"{name} has {a} pears. She buys {b}. How many?" for name in ("Mia", "Tom") for a in range(5) for b in range(5)
]
REWARD = "def evenness(completions, **columns):\n    return [sum(map(ord, c)) % 2 + len(c) / 50 for c in completions]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """train.py with LoRA on a random model: 4 steps, saved at 2 and 4. Folder, command line, finished process."""
    folder = tmp_path_factory.mktemp("lora")
    base = save_tiny(folder / "base", spread=1.5)
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": "1"}) for q in QUESTIONS))
    (folder / "reward.py").write_text(REWARD)
    before = tree_sha256(base)
    arguments = [
        "--model",
        str(base),
        "--data",
        str(folder / "data.jsonl"),
        "--rewards",
        json.dumps({f"{folder}/reward.py:evenness": 1.0}),
        "--lora_r",
        "4",
        "--lr",
        "3e-2",
        "--beta",
        "0.01",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--max_prompt_length",
        "64",
        "--max_generate_length",
        "12",
        "--chat_template",
        "false",
        "--runs_dir",
        str(folder / "runs"),
        "--run_name",
        "lora",
        "--num_threads",
        "1",
        "--deterministic",
        "true",
    ]
    done = fork_script("train.py", *arguments, "--output_dir", str(folder / "output"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, arguments, done, before


# --- what a run leaves


def test_a_run_writes_an_adapter_and_leaves_its_model_alone(run):
    folder, _, done, before = run
    last = folder / "output" / "checkpoint_4"
    assert done.stdout.count("LoRA weights saved and verified.") == 2
    assert verify(last) is None and not (last / "model.safetensors").exists() and not (last / "config.json").exists()
    assert tree_sha256(folder / "base") == before, "training changed the model's own files"
    first, second = (load_file(folder / "output" / f"checkpoint_{n}" / ADAPTER_WEIGHTS) for n in (2, 4))
    assert first.keys() == second.keys() and all(not torch.equal(first[name], second[name]) for name in first)
    size, whole = (path.stat().st_size for path in (last / ADAPTER_WEIGHTS, folder / "base" / "model.safetensors"))
    assert size < whole / 2 and json.loads((last / ADAPTER_CONFIG).read_text())["r"] == 4


def test_plain_peft_opens_it_and_says_the_same(run):
    last = run[0] / "output" / "checkpoint_4"
    theirs, ours = AutoPeftModelForCausalLM.from_pretrained(last), adapters.open_adapter(last, CPU)
    ids = torch.tensor([AutoTokenizer.from_pretrained(last)(QUESTIONS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, ours(ids).logits)
        base = load_model(str(run[0] / "base"), CPU)(ids).logits
    assert (base - ours(ids).logits).abs().max() > 1e-3, "the adapter changes nothing: the comparison shows nothing"


def greedy(model, prompts):
    engine = NativeEngine(model, [0], 24, seed=0)
    requests = [Request(i, i, 0, ids) for i, ids in enumerate(prompts)]
    return [done.token_ids.tolist() for done in engine.generate(requests, Sampling(temperature=0.0))]


def test_adapter_and_merged_give_the_same_greedy_text(run, tmp_path):
    """50 prompts: the adapter beside its model, its folder as inference.py opens it, a merged folder; control: base."""
    last = run[0] / "output" / "checkpoint_4"
    whole = tmp_path / "merged"
    shutil.copytree(last, whole)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "MANIFEST.json"):
        (whole / name).unlink()
    adapters.merged(adapters.open_adapter(last, CPU)).save_pretrained(whole)
    checkpoint_models = [CheckpointModel(folder, CPU, {"temperature": 0.0}, 24) for folder in (last, whole)]
    prompts = [checkpoint_models[0].encode(question) for question in QUESTIONS]
    beside = greedy(adapters.plain(adapters.open_adapter(last, CPU)), prompts)
    assert len(beside) == 50
    for checkpoint_model in checkpoint_models:
        assert greedy(checkpoint_model.engine.model, prompts) == beside
    base = greedy(load_model(str(run[0] / "base"), CPU), prompts)
    assert sum(a != b for a, b in zip(base, beside)) > 25, "the adapter changes nothing: equal texts show nothing"


def test_resuming_gives_the_same_bits(run, tmp_path):
    folder, arguments, _, _ = run
    shutil.copytree(folder / "output" / "checkpoint_2", tmp_path / "output" / "checkpoint_2")
    done = fork_script("train.py", *arguments, "--output_dir", str(tmp_path / "output"))
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    assert "step: 3/4" in done.stdout and "step: 2/4" not in done.stdout
    for name in (ADAPTER_WEIGHTS, "trainer/optimizer-00000-of-00001.safetensors"):
        again, straight = (out / "checkpoint_4" / name for out in (tmp_path / "output", folder / "output"))
        assert again.read_bytes() == straight.read_bytes(), name
    refused = fork_script("train.py", *arguments, "--lora_r", "8", "--output_dir", str(tmp_path / "output"))
    assert refused.returncode == 2 and "lora_r: 4 there, 8 now" in refused.stderr


@pytest.mark.full
@pytest.mark.parametrize("stage", ["2", "3"])
def test_another_backend_and_number_of_ranks_continue_it(run, tmp_path, stage):
    folder, arguments, _, _ = run
    shutil.copytree(folder / "output" / "checkpoint_2", tmp_path / "output" / "checkpoint_2")
    arguments = [*arguments[: arguments.index("--deterministic")], "--backend", "deepspeed", "--zero_stage", stage]
    state = tmp_path / "output" / "checkpoint_2" / "trainer" / "state.json"
    state.write_text(state.read_text().replace('"deterministic": true', '"deterministic": false'))
    checkpoint.write_manifest(tmp_path / "output" / "checkpoint_2", 2)
    done = fork_script("train.py", *arguments, "--output_dir", str(tmp_path / "output"), nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        load_file(out / "checkpoint_4" / ADAPTER_WEIGHTS) for out in (tmp_path / "output", folder / "output")
    )
    start = load_file(folder / "output" / "checkpoint_2" / ADAPTER_WEIGHTS)
    moved = sum(float((theirs[n] - start[n]).norm() ** 2) for n in start) ** 0.5
    assert sum(float((theirs[n] - ours[n]).norm() ** 2) for n in start) ** 0.5 < 1e-3 * moved


# --- inside


def settings(**how):
    return Config(**{"model": "m", "data": "d", "rewards": {"r": 1.0}, "lora_r": 4, **how})


def shaken(model, seed=0):
    """An adapter as after training: B no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.adapter_tensors(model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_and_body_are_found_through_the_adapter(architecture):
    """No fallback to whole logits; log-probs are those of the model's own logits; only the adapter gets gradient."""
    model = shaken(adapters.start_lora(tiny_model(architecture), settings()))
    scorer = Scorer(model, settings())
    assert scorer.head.usable
    ids = torch.arange(3, 15)[None]
    logits = model(ids).logits
    hidden = scorer.head.body()(input_ids=ids, use_cache=False).last_hidden_state
    assert (scorer.head.logits(hidden) - logits).abs().max() < 1e-5
    logits.square().sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == set(adapters.adapter_tensors(model)) and all(
        model.get_parameter(n).grad.abs().sum() > 0 for n in moved
    )


def test_the_reference_is_the_model_itself_without_its_adapter():
    """KL costs no second model: as many parameters with beta as without; the control of full training has twice."""

    def held(cfg, reference=None):
        model = tiny_model("qwen3")
        policy = Policy(cfg, ALONE, adapters.start_lora(model, cfg) if cfg.lora_r else model, reference)
        modules = [policy.model, *([] if policy.reference is None else [policy.reference])]
        return policy, sum(p.numel() for module in modules for p in module.parameters())

    with_kl, elements = held(settings(beta=0.1))
    assert with_kl.shares_reference and elements == held(settings())[1]
    whole = settings(lora_r=0, beta=0.1)
    assert held(whole, tiny_model("qwen3"))[1] == 2 * held(settings(lora_r=0))[1]
    ids = torch.arange(3, 15)[None]
    shaken(with_kl.model)
    with torch.no_grad():
        on = with_kl.model(ids).logits
        with adapters.as_reference(with_kl.model):
            off = with_kl.model(ids).logits
        assert torch.equal(off, tiny_model("qwen3")(ids).logits) and torch.equal(with_kl.model(ids).logits, on)
    assert not torch.equal(on, off)
    assert all(p.requires_grad for p in adapters.adapter_tensors(with_kl.model).values())


def test_the_start_depends_on_the_seed_alone():
    def start(seed, noise):
        torch.manual_seed(noise)
        model = adapters.start_lora(tiny_model("qwen3"), settings(seed=seed))
        return {name: p.detach().clone() for name, p in adapters.adapter_tensors(model).items()}

    one, two, other = start(1, 0), start(1, 99), start(2, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in one:
        assert torch.equal(one[name], other[name]) == ("lora_B" in name)
    state = torch.random.get_rng_state()
    model = tiny_model("qwen3")
    state = torch.random.get_rng_state()
    adapters.start_lora(model, settings())
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator moved"


def test_frozen_layers_in_bf16_change_no_bit_under_bf16_arithmetic(tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2")
    ids = torch.arange(3, 15)[None]
    found = {}
    for backend in ("ddp", "deepspeed"):  # which keeps fp32
        model = shaken(load_trained(settings(model=str(base), dtype="bf16", backend=backend), CPU))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        logits.float().square().mean().backward()
        found[backend] = (logits, [p.grad for p in adapters.adapter_tensors(model).values()])
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        found[backend] += (frozen,)
    assert torch.equal(found["ddp"][0], found["deepspeed"][0])
    assert all(torch.equal(a, b) for a, b in zip(found["ddp"][1], found["deepspeed"][1]))
    assert found["ddp"][2] < 0.8 * found["deepspeed"][2], "nothing was held in bf16"
    assert Scorer(model, settings(dtype="bf16")).head.usable


def test_dropout_follows_from_its_key_alone(tmp_path):
    """The same masks again, also in a recomputed forward; others for another key; none while sampling."""
    ids = torch.arange(3, 63).view(2, 30)

    def gradients(key, dropout=0.5, checkpointing=False, training=True):
        model = shaken(adapters.start_lora(tiny_model("llama"), settings(lora_dropout=dropout)))
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        adapters.key_dropout(model, *key)
        model.train(training)(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.ravel() for p in adapters.adapter_tensors(model).values()])

    one = gradients((1, 0, 5))
    torch.manual_seed(99)
    assert torch.equal(one, gradients((1, 0, 5))) and torch.allclose(one, gradients((1, 0, 5), checkpointing=True))
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert not torch.allclose(one, gradients(other), rtol=0.1), other
    without = gradients((1, 0, 5), dropout=0.0)
    assert torch.equal(without, gradients((1, 0, 5), training=False)) and not torch.allclose(one, without, rtol=0.1)
    begun = adapters.load_lora(settings(model=str(save_tiny(tmp_path / "base")), lora_dropout=0.5), torch.device("cpu"))
    assert not any(module.training for module in begun.modules())  # the first forwards are comparisons and evaluations
    layers = adapters.KeyedDropout(0.25, 0).train()
    kept = layers(torch.ones(200, 200))
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_is_refused_in_grpo(tmp_path):
    cfg = settings(model=str(save_tiny(tmp_path / "base")), lora_dropout=0.1)
    with pytest.raises(UserError, match=r"^lora_dropout: must be 0 in GRPO"):
        load_policy(cfg, ALONE)


def save(folder, policy, cfg, step=2):
    snapshot = checkpoint.take_snapshot(
        step, policy, saving.serialized_tokenizer(tiny_tokenizer()), Recipe(), cfg, {"data": "x"}
    )
    return checkpoint.write_snapshot(snapshot, folder, ALONE, None, lambda phase: None)


def test_training_goes_on_from_an_adapter_and_keeps_it_as_reference(tmp_path):
    """SFT, then GRPO: the same rank and scale, on the same model; the frozen start is the adapter, not the model."""
    base = save_tiny(tmp_path / "base")
    cfg = settings(model=str(base))
    first = load_policy(cfg, ALONE)
    shaken(first.model)
    assert save(tmp_path, first, cfg) is None
    then = settings(model=str(tmp_path / "checkpoint_2"), beta=0.1)
    policy = load_policy(then, ALONE)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        wanted = first.model(ids).logits
        assert torch.equal(policy.model(ids).logits, wanted)
        shaken(policy.model, seed=1)
        with adapters.as_reference(policy.model):
            assert torch.equal(policy.model(ids).logits, wanted)
        assert not torch.equal(policy.model(ids).logits, wanted)
    assert [n for n, _ in policy.weights()] == [n for n, _ in first.weights()]
    assert save(tmp_path, policy, then, step=3) is None
    assert adapter_files.base_of(tmp_path / "checkpoint_3") == str(base)
    for wrong, named in (({"lora_r": 8}, "does not fit"), ({"lora_alpha": 1.0}, "lora_alpha")):
        with pytest.raises(UserError, match=named):
            load_policy(dataclasses.replace(then, **wrong), ALONE)


def test_moments_come_back(tmp_path):
    base = save_tiny(tmp_path / "base")
    cfg = settings(model=str(base))
    policy = load_policy(cfg, ALONE)
    for _ in range(2):
        ids = torch.arange(4, 20)[None]
        policy.backend.backward(policy.model(ids, labels=ids).loss, last=True)
        policy.backend.step(1e-2, 1.0)
        policy.counters.updates += 1
    assert save(tmp_path, policy, cfg) is None
    other = load_policy(cfg, ALONE, tmp_path / "checkpoint_2")
    resume.restore(other, tmp_path / "checkpoint_2")
    held = (policy.backend.local_tensors(), other.backend.local_tensors())
    for ours, theirs in ((policy.weights(), other.weights()), held):
        assert all(name == again and torch.equal(a, b) for (name, a), (again, b) in zip(ours, theirs, strict=True))


# --- refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with a good adapter."""
    folder = tmp_path_factory.mktemp("good")
    cfg = settings(model=str(save_tiny(folder / "base")))
    policy = load_policy(cfg, ALONE)
    shaken(policy.model)
    assert save(folder, policy, cfg) is None
    return folder / "checkpoint_2"


def test_an_adapter_that_learned_nothing_is_not_saved(tmp_path):
    cfg = settings(model=str(save_tiny(tmp_path / "base")))
    policy = load_policy(cfg, ALONE)
    assert "all its weights are zero" in save(tmp_path, policy, cfg)
    shaken(policy.model)
    name, parameter = next(iter(adapters.adapter_tensors(policy.model).items()))
    parameter.data[0, 0] = torch.nan
    assert f"{adapter_files.outer_name(name)} holds NaN or Inf" in save(tmp_path, policy, cfg)
    assert not list(tmp_path.glob("*checkpoint*")), "something of it was left"
    parameter.data[0, 0] = 0.0
    half = [p for n, p in adapters.adapter_tensors(policy.model).items() if "layers.0" in n]
    for parameter in half:
        parameter.data.zero_()
    assert save(tmp_path, policy, cfg) is None
    said = adapter_files.saved_line(tmp_path / "checkpoint_2")
    assert said == "LoRA weights saved and verified. 7 of 14 modules are still zero."


def config_with(**changes):
    def spoil(folder):
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def tensors_with(change):
    def spoil(folder):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        save_file(change(tensors), folder / ADAPTER_WEIGHTS)

    return spoil


def pickled(folder):
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")


REFUSED = {
    "all zero": (tensors_with(lambda t: {n: v * 0 for n, v in t.items()}), "all its weights are zero"),
    "B zero": (tensors_with(lambda t: {n: v * ("lora_A" in n) for n, v in t.items()}), "all its weights are zero"),
    "not finite": (tensors_with(lambda t: {n: v / 0 for n, v in t.items()}), "NaN or Inf"),
    "a tensor missing": (tensors_with(lambda t: dict(list(t.items())[1:])), "does not fit"),
    "another shape": (tensors_with(lambda t: {n: v[:, :-1].contiguous() for n, v in t.items()}), "does not fit"),
    "a vector": (tensors_with(lambda t: {n: v[0].contiguous() for n, v in t.items()}), "not a matrix of plain LoRA"),
    "other names": (tensors_with(lambda t: {f"x.{n}": v for n, v in t.items()}), "not a matrix of plain LoRA"),
    "pickle": (pickled, "adapter_model.bin"),
    "another rank": (config_with(r=3), "does not fit"),
    "rank of the wrong type": (config_with(r="8"), "r is"),
    "another kind": (config_with(peft_type="IA3"), "peft_type"),
    "DoRA": (config_with(use_dora=True), "use_dora"),
    "modules to save": (config_with(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (config_with(bias="all"), "bias"),
    "a pattern": (config_with(target_modules="(a+)+$"), "target_modules"),
    "a pattern of ranks": (config_with(rank_pattern={"(a+)+$": 4}), "rank_pattern"),
    "a start that changed the model": (config_with(init_lora_weights="pissa"), "init_lora_weights"),
    "a setting nobody knows": (config_with(surprise=[1]), "surprise"),
    "layers that are not there": (config_with(target_modules=["nothing"]), "nothing"),
    "no model there": (config_with(base_model_name_or_path="/elsewhere/model"), "/elsewhere/model"),
    "no model named": (config_with(base_model_name_or_path=None), "base_model_name_or_path"),
    "config cut": (lambda folder: (folder / ADAPTER_CONFIG).write_text('{"r": 4'), "adapter_config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_adapters_are_one_line(good, tmp_path, name):
    spoil, named = REFUSED[name]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    (folder / "MANIFEST.json").unlink()
    load_model(str(folder), CPU)
    spoil(folder)
    with pytest.raises(UserError, match=r"(?s)" + named.replace("(", r"\(")) as caught:
        load_model(str(folder), CPU)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_adapter_on_itself_is_refused(good, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    config_with(base_model_name_or_path=str(folder))(folder)
    with pytest.raises(UserError, match="an adapter itself"):
        load_model(str(folder), CPU)


WRONG = [
    ({"lora_r": -1}, "lora_r"),
    ({"lora_alpha": 0.0}, "lora_alpha"),
    ({"lora_dropout": 1.0}, "lora_dropout"),
    ({"lora_target_modules": []}, "lora_target_modules"),
    ({"lora_r": 0, "lora_alpha": 8.0}, "lora_alpha"),
    ({"lora_r": 0, "load_in_4bit": True}, "load_in_4bit"),
    ({"lora_r": 0, "lora_target_modules": ["q"]}, "lora_target"),
    ({"load_in_4bit": True, "backend": "deepspeed"}, "load_in_4bit"),
    ({"optimizer": "adamw_8bit", "backend": "deepspeed"}, "optimizer"),
    ({"reference_offload": True}, "reference"),
]


@pytest.mark.parametrize("wrong, named", WRONG)
def test_settings_without_effect_are_refused(wrong, named):
    check(settings())
    with pytest.raises(UserError, match=f"^{named}"):
        check(settings(**wrong))


@pytest.mark.parametrize("modules", [["nothing"], ["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"]])
def test_target_modules_that_do_not_fit_are_refused(modules):
    with pytest.raises(UserError, match=r"^lora_target_modules"):
        adapters.start_lora(tiny_model("llama"), settings(lora_target_modules=modules))


def test_target_modules_choose():
    model = adapters.start_lora(tiny_model("llama"), settings(lora_target_modules=["q_proj", "v_proj"]))
    assert {name.split(".")[-4] for name in adapters.adapter_tensors(model)} == {"q_proj", "v_proj"}


def test_inference_opens_an_adapter_and_says_no_to_a_bad_one(good, tmp_path):
    (good / "trainer" / "recipe.json").write_text(recipe_text(Recipe(max_prompt_length=64, max_generate_length=8)))
    checkpoint.write_manifest(good, 2)
    done = fork_script("inference.py", "--checkpoint", str(good), "2+2?")
    assert done.returncode == 0 and "回答" in done.stdout, done.stderr[-2000:]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    REFUSED["all zero"][0](folder)
    checkpoint.write_manifest(folder, 2)
    done = fork_script("inference.py", "--checkpoint", str(folder), "2+2?")
    assert done.returncode == 2 and "all its weights are zero" in done.stderr.splitlines()[-1]
