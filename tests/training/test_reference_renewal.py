"""reference_sync_steps: the mixture by hand, on every rank and backend, through checkpoints and resumes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.checkpoints.manifest import verify
from grpo.config.checks import check
from grpo.config.from_trl import convert
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.loading import load_plain
from grpo.run.pushing import stage
from grpo.runtime.distributed import start
from grpo.training.metrics import Tally
from grpo.training.reference_renewal import KeptReference, keep_reference, renew_reference
from tests.support.launcher import fork_script, run_ranks
from tests.support.rank_jobs import config, injected_step, make_policy
from tests.support.tiers import short
from tests.support.tiny import save_tiny, tiny_model

KL = {"beta": 0.3}
RENEWED = {**KL, "reference_sync_steps": 2, "reference_mixup": 0.6}


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mixup", [1.0, 0.25])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_the_mixture_by_hand(architecture, mixup):
    cfg = config(**KL, reference_sync_steps=2, reference_mixup=mixup)
    policy = make_policy(cfg, start(), architecture)
    injected_step(cfg, policy.world, policy, 0, 2, 0, Tally())
    before, trained = copies(policy.reference.model), copies(policy.model)
    renew_reference(policy, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), policy.reference.model.parameters(), strict=True))
    renew_reference(policy, 2)
    after = copies(policy.reference.model)
    assert after.keys() == trained.keys() and len(after) > 10
    for name, tensor in after.items():
        expected = mixup * trained[name].double() + (1 - mixup) * before[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(tensor, trained[name]) == (mixup == 1.0 or torch.equal(before[name], trained[name])), name
    assert all(torch.equal(a, b) for a, b in zip(trained.values(), policy.model.parameters(), strict=True))


def test_the_next_step_is_scored_by_the_new_reference():
    cfg = config(**KL, reference_sync_steps=1)
    policy = make_policy(cfg, start())
    tally = Tally()
    injected_step(cfg, policy.world, policy, 0, 2, 0, tally)
    assert tally.reduce(policy.world).metrics["kl"] > 1e-2
    renew_reference(policy, 1)
    tally = Tally()
    injected_step(cfg, policy.world, policy, 1, 2, 0, tally)
    assert abs(tally.reduce(policy.world).metrics["kl"]) < 1e-9, "the reference is the policy"


# --- ranks


ZERO3 = {"backend": "deepspeed", "zero_stage": 3}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(W, name) -> what each rank reported, and the final weights as one vector."""
    jobs = {
        1: {"start": {"steps": 0}, "renewed": RENEWED, "fixed": KL},
        2: {"renewed": RENEWED, "zero3": {**RENEWED, **ZERO3}},
    }
    found = {}
    for world_size, of_world in jobs.items():
        out = tmp_path_factory.mktemp(f"ranks_{world_size}")
        calls = [("injected_updates", {"name": name, "steps": 7, **how}) for name, how in of_world.items()]
        by_rank = run_ranks(calls, world_size, out, timeout=240)
        for i, name in enumerate(of_world):
            weights = load_file(out / f"{name}.safetensors")
            end = torch.cat([weights[key].flatten().double() for key in sorted(weights)])
            found[world_size, name] = ([rank[i] for rank in by_rank], end)
    return found


@pytest.mark.parametrize("name", ["renewed", "zero3"])
def test_every_rank_and_backend_has_the_same_reference(results, name):
    alone, begin, several = results[1, "renewed"], results[1, "start"][1], results[2, name]
    assert float((alone[1] - several[1]).norm() / (alone[1] - begin).norm()) < 1e-3
    assert several[0][0]["reference"] == several[0][1]["reference"]
    assert several[0][0]["reference"] == pytest.approx(alone[0][0]["reference"], rel=1e-3, abs=1e-2)


def test_a_reference_that_stays_gives_another_end(results):
    """The control of the test above."""
    one, other, begin = (results[1, name][1] for name in ("renewed", "fixed", "start"))
    assert float((one - other).norm() / (one - begin).norm()) > 1e-2


# --- checkpoints


SETTINGS = """
model: base
data: d.jsonl
prompt_template: "{question}"
chat_template: false
batch_size: 2
gradient_accumulation_steps: 1
num_generations: 4
max_prompt_length: 64
max_generate_length: 8
lr: 0.01
beta: 0.5
reference_mixup: 0.6
rewards: {"r.py:length_reward": 1.0}
save_steps: 2
log_samples_steps: 0
report_to: none
num_threads: 1
"""
REWARD = (
    "def length_reward(completions, **columns):\n    return [sum(map(ord, text)) % 11 / 11 for text in completions]\n"
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "base", "gpt2")
    (folder / "r.py").write_text(REWARD)
    rows = [json.dumps({"question": f"{n}+2?", "answer": str(n + 2)}) for n in range(5)]
    (folder / "d.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "t.yaml").write_text(SETTINGS)

    def run(name, every, steps, *more, nproc=None):
        out = ("--output_dir", name, "--reference_sync_steps", str(every), "--max_steps", str(steps))
        done = fork_script("train.py", "--config", "t.yaml", *out, *more, nproc=nproc, cwd=folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return folder / name / f"checkpoint_{steps}"

    return run


def tensors_of(checkpoint):
    return [
        load_file(path) for path in (checkpoint / "model.safetensors", checkpoint / "trainer/reference.safetensors")
    ]


@pytest.mark.parametrize("every", [2, 3])
def test_a_resumed_run_ends_with_the_same_bits(task, every):
    """Renewed at step 2, which the checkpoint holds, or at step 3, after the resume."""
    whole = task(f"whole_{every}", every, 4)
    halfway = task(f"halves_{every}", every, 2)
    resumed = task(f"halves_{every}", every, 4, "--resume", "must")
    weights, reference = tensors_of(whole)
    for ours, theirs in zip((weights, reference), tensors_of(resumed), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(weights[name], reference[name]) for name in reference)
    base = load_file(whole.parents[1] / "base" / "model.safetensors")
    kept = tensors_of(halfway)[1]
    assert all(torch.equal(kept[name], base[name]) for name in kept) == (every == 3)


ZERO2 = ("--backend", "deepspeed", "--zero_stage", "2")
ON_TWO = {"ddp": (), "zero2": ZERO2, "zero3": ("--backend", "deepspeed", "--zero_stage", "3")}


@pytest.mark.parametrize("name", short(ON_TWO, ["ddp", "zero3"]))
def test_a_resumed_run_on_two_ranks_ends_with_the_same_bits(task, name):
    """Renewed at step 2, which the checkpoint holds, or at step 3, after the resume; every rank reads the reference."""
    for every in (2, 3):
        whole = task(f"{name}_whole_{every}", every, 4, *ON_TWO[name], nproc=2)
        halfway = task(f"{name}_halves_{every}", every, 2, *ON_TWO[name], nproc=2)
        resumed = task(f"{name}_halves_{every}", every, 4, "--resume", "must", *ON_TWO[name], nproc=2)
        for ours, theirs in zip(tensors_of(whole), tensors_of(resumed), strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    base = load_file(whole.parents[1] / "base" / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in tensors_of(halfway)[1].items())


def test_the_kept_reference_is_neither_the_model_nor_sent_to_a_hub(task, tmp_path):
    checkpoint = task("whole_2", 2, 4)
    assert verify(checkpoint) is None and (checkpoint / "trainer" / "reference.safetensors").is_file()
    weights, reference = tensors_of(checkpoint)
    opened = copies(load_plain(str(checkpoint), torch.device("cpu")))
    assert all(torch.equal(opened[name], weights[name]) for name in opened) and opened.keys() == reference.keys()
    stage(checkpoint, tmp_path / "staged", {"model": "m", "data": "d"})
    sent = {path.name for path in (tmp_path / "staged").rglob("*") if path.is_file()}
    assert "model.safetensors" in sent and not {name for name in sent if name.startswith(("optimizer", "reference"))}
    assert verify(tmp_path / "staged") is None


def test_tied_tensors_are_kept_once_and_others_are_refused(tmp_path):
    kept = KeptReference(tiny_model("gpt2", 300))
    tensors = kept.tensors()
    assert "lm_head.weight" not in tensors and "transformer.wte.weight" in tensors
    save_file(tensors, tmp_path / "reference.safetensors")
    other = KeptReference(tiny_model("gpt2", 300, seed=3))
    other.load(load_file(tmp_path / "reference.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), other.tensors().values(), strict=True))
    name = next(iter(tensors))
    for broken, said in (
        ({**tensors, "x": tensors[name]}, "names are not those of the model, such as x"),
        ({**tensors, name: tensors[name][:1]}, "has another shape"),
        ({**tensors, name: tensors[name] * float("nan")}, "holds NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            other.load(broken)


def test_checkpoints_keep_it_only_where_it_changes():
    policy = make_policy(config(**RENEWED), start())
    keep_reference(policy)
    assert list(policy.extras) == ["reference"] and not make_policy(config(**KL), start()).extras


# --- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reference_sync_steps": 5}, "reference_sync_steps: there is no reference to renew, beta is 0, got 5"),
        ({"reference_sync_steps": 5, "beta": 0.1, "lora_r": 4}, "with lora_r it is the frozen model itself, got 5"),
        ({"reference_sync_steps": -1, "beta": 0.1}, "reference_sync_steps: must be >= 0, got -1"),
        ({"reference_mixup": 0.6, "beta": 0.1}, "reference_mixup: it needs reference_sync_steps, got 0.6"),
        ({"reference_sync_steps": 5, "beta": 0.1, "reference_mixup": 0.0}, r"reference_mixup: must be in \(0, 1\]"),
    ],
)
def test_settings_without_effect_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        check(Config(model="m", data="d", rewards={"r": 1.0}, **settings))


def test_options_of_trl():
    names = ("reference_sync_steps", "reference_mixup")
    given = {"sync_ref_model": True, "beta": 0.1, "num_iterations": 2}
    assert [convert(given, 2).settings[name] for name in names] == [256, 0.6]
    given |= {"ref_model_sync_steps": 7, "ref_model_mixup_alpha": 1.0}
    assert [convert(given, 2).settings[name] for name in names] == [4, 1.0]
    for less in ({"beta": 0.0}, {"use_peft": True}):
        recipe = convert({**given, **less}, 2)
        assert not {*names} & {*recipe.settings} and recipe.lost[0].startswith("sync_ref_model: true. It needs beta")
    assert not {*names} & {*convert({"beta": 0.1, "ref_model_sync_steps": 7}, 2).settings}
