"""Checkpoints: committed whole, verified, pruned, opened by plain transformers."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.checkpoints import background as saving
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints import resume
from grpo.checkpoints.manifest import MANIFEST, manifest_text
from grpo.config.settings import Config
from grpo.data.recipe import Recipe, load_recipe
from grpo.errors import UserError
from grpo.runtime.distributed import World
from grpo.training.policy import Policy
from tests.support.tiny import tiny_model, tiny_tokenizer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def new_policy(cfg, architecture="qwen3", seed=0):
    return Policy(cfg, ALONE, tiny_model(architecture, 300, seed=seed))


def trained(cfg):
    policy = new_policy(cfg)
    for _ in range(2):
        loss = policy.model(torch.arange(4, 20)[None], labels=torch.arange(4, 20)[None]).loss
        policy.backend.backward(loss, last=True)
        policy.backend.step(1e-2, 1.0)
        policy.counters.updates += 1
    return policy


def save(folder, step, policy, recipe, cfg, facts):
    """Take and write checkpoint_{step}; what went wrong, or None."""
    snapshot = checkpoint.take_snapshot(step, policy, saving.serialized_tokenizer(tiny_tokenizer()), recipe, cfg, facts)
    return checkpoint.write_snapshot(snapshot, folder, ALONE, cfg.save_total_limit, lambda phase: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    cfg = Config(model="m", data="d", rewards={"r": 1.0})
    policy = trained(cfg)
    recipe = Recipe(system_prompt="quote ' and \"", prompt_template="{question}\n", questions=["小明?"])
    assert save(folder, 7, policy, recipe, cfg, {"data": "abc"}) is None
    return folder / "checkpoint_7", policy, recipe, cfg


def test_plain_transformers_opens_it(saved):
    folder, policy, _, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(4, 20)[None]
    assert torch.equal(model(ids).logits, policy.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("Mia")["input_ids"] == tiny_tokenizer()("Mia")["input_ids"]


def test_everything_comes_back(saved):
    folder, policy, recipe, cfg = saved
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = Policy(cfg, ALONE, model)
    assert resume.restore(other, folder) == policy.counters.step
    for (name, ours), (_, theirs) in zip(policy.weights(), other.weights()):
        assert torch.equal(ours, theirs), name
    ours, theirs = list(policy.backend.moments()), list(other.backend.moments())
    assert len(ours) == len(theirs) == 2 * len(dict(policy.model.named_parameters()))
    for a, b in zip(ours, theirs):
        assert (a.name, a.moment, a.start) == (b.name, b.moment, b.start) and torch.equal(a.values, b.values)
    assert other.counters == policy.counters and other.counters.updates == 2
    assert load_recipe(folder / "trainer" / "recipe.json") == recipe


def test_no_pickle_in_it(saved):
    suffixes = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}, suffixes


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_or_cut_is_refused_by_name(saved, tmp_path, data):
    """Manifest included. The control: the untouched copy is valid."""
    copy = tmp_path / "checkpoint_7"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved[0], copy)
    assert checkpoint.verify(copy) is None
    name = data.draw(st.sampled_from([n for n in files_of(copy) if n != MANIFEST]))
    content = bytearray((copy / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:place]
    (copy / name).write_bytes(bytes(content))
    problem = checkpoint.verify(copy)
    assert problem is not None and name in problem


@pytest.mark.parametrize("damage", ["missing file", "no manifest", "bad manifest", "symlink", "outside"])
def test_other_damage_is_refused(saved, tmp_path, damage):
    copy = tmp_path / "checkpoint_7"
    shutil.copytree(saved[0], copy)
    manifest = copy / MANIFEST
    if damage == "missing file":
        (copy / "config.json").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "symlink":
        target = tmp_path / "elsewhere.json"
        shutil.move(copy / "config.json", target)
        (copy / "config.json").symlink_to(target)
    else:
        listed = json.loads(manifest.read_text())
        listed["files"]["../config.json"] = listed["files"]["config.json"]
        manifest.write_text(manifest_text(7, listed["files"]))
    assert checkpoint.verify(copy) is not None


def test_a_checkpoint_under_another_steps_name_is_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoint_8")
    shutil.copytree(saved[0], tmp_path / "my copy")
    assert checkpoint.verify(tmp_path / "checkpoint_8") == f"{MANIFEST} belongs to step 7"
    assert checkpoint.verify(tmp_path / "my copy") is None, "a name of its own says nothing"


def test_the_newest_valid_one_is_used_and_the_damaged_one_named(saved, tmp_path):
    _, policy, recipe, cfg = saved
    for step in (5, 20, 100):
        assert save(tmp_path, step, policy, recipe, cfg, {}) is None
    shutil.copytree(saved[0], tmp_path / "checkpoint_200-tmp")
    (tmp_path / "checkpoint_100" / "model.safetensors").write_bytes(b"")
    notices: list[str] = []
    assert checkpoint.newest_valid(tmp_path, notices.append) == tmp_path / "checkpoint_20"
    assert len(notices) == 1 and "checkpoint_100" in notices[0] and "model.safetensors" in notices[0]


def test_a_write_that_fails_leaves_the_old_ones_and_no_junk(saved, tmp_path, monkeypatch):
    _, policy, recipe, cfg = saved
    assert save(tmp_path, 1, policy, recipe, cfg, {}) is None

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "No space left" in save(tmp_path, 2, policy, recipe, cfg, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]
    assert checkpoint.verify(tmp_path / "checkpoint_1") is None


def test_the_limit_counts_valid_checkpoints_only(saved, tmp_path):
    _, policy, recipe, cfg = saved
    cfg = dataclasses.replace(cfg, save_total_limit=2)
    for step in (1, 2, 3):
        assert save(tmp_path, step, policy, recipe, cfg, {}) is None
    (tmp_path / "checkpoint_3" / "config.json").write_text("{}")
    assert save(tmp_path, 4, policy, recipe, cfg, {}) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_2", "checkpoint_3", "checkpoint_4"]


def test_a_damaged_one_of_the_same_step_is_set_aside(saved, tmp_path):
    _, policy, recipe, cfg = saved
    shutil.copytree(saved[0], tmp_path / "checkpoint_7")
    (tmp_path / "checkpoint_7" / "config.json").write_text("{}")
    assert save(tmp_path, 7, policy, recipe, cfg, {}) is None
    assert checkpoint.verify(tmp_path / "checkpoint_7") is None
    assert (tmp_path / "damaged-checkpoint_7").is_dir()


def test_prepare_output_sweeps_junk_and_sets_old_runs_aside(saved, tmp_path):
    (tmp_path / ".tmp-checkpoint_9-123").mkdir()
    shutil.copytree(saved[0], tmp_path / "checkpoint_7")
    checkpoint.prepare_output(tmp_path, "auto")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_7"]
    checkpoint.prepare_output(tmp_path, "never")
    assert [p.name for p in tmp_path.iterdir()] == ["previous"]
    assert checkpoint.verify(tmp_path / "previous" / "checkpoint_7") is None


@pytest.mark.parametrize(
    "change, named", [({"lr": 1.0}, "lr: "), ({"seed": 9}, "seed: "), ({"num_generations": 8}, "num_gen")]
)
def test_resume_refuses_what_changes_the_trajectory(saved, change, named):
    folder, _, _, cfg = saved
    state = resume.read_state(folder)
    facts = {"data": "abc"}
    resume.check_same_run(folder, state, cfg, facts)
    resume.check_same_run(
        folder, state, dataclasses.replace(cfg, save_steps=1, micro_batch_tokens=7, max_steps=9), facts
    )
    with pytest.raises(UserError, match=named):
        resume.check_same_run(folder, state, dataclasses.replace(cfg, **change), facts)
    with pytest.raises(UserError, match="data has changed"):
        resume.check_same_run(folder, state, cfg, {"data": "other"})


def test_optimizer_state_of_another_model_is_refused(saved):
    with pytest.raises(UserError, match=r"optimizer state of .* belongs to another model"):
        resume.restore(new_policy(saved[3], "llama"), saved[0])
