"""A branch, tag or commit of a model on the hub: what is loaded, what is recorded, what a resume compares."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.checkpoints.resume import check_same_run, read_state
from grpo.config.checks import check
from grpo.config.names import model_name
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.lora_checks import check_adapter
from grpo.models.lora_files import base_of
from tests.support.launcher import PROJECT, environment
from tests.support.local_hub import COMMIT, commit_of_branch, local_hub
from tests.support.tiny import save_tiny

V1 = commit_of_branch("v1")
GOOD = {"data": "d", "rewards": {"mark_reward": 1.0}}
ASK = """
import json, sys, torch
from pathlib import Path
from grpo.errors import UserError
from grpo.models.checks import load_model, quiet
from grpo.models.loading import load_tokenizer
quiet()
for name in json.loads(sys.argv[1]):
    try:
        model = load_model(name, torch.device("cpu"))
        commit = Path(load_tokenizer(name).name_or_path).name
        print(json.dumps([commit, model.get_input_embeddings().weight[0, 0].item()]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(environment of a client, folder); main and branch v1 hold other weights."""
    folder = tmp_path_factory.mktemp("hub")
    for branch in ("main", "v1"):
        save_tiny(folder / branch)
    weights = load_file(folder / "v1" / "model.safetensors")
    torch.manual_seed(5)
    save_file(
        {name: torch.randn_like(value) * 0.1 for name, value in weights.items()},
        folder / "v1" / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "rows.jsonl").write_text('{"question": "2+2?"}\n{"question": "3+3?"}\n')
    (folder / "rewards.py").write_text(
        "def varied(completions, **columns):\n    return [len(t) for t in completions]\n"
    )
    with local_hub({("models", "user/tiny"): folder / "main", ("models", "user/tiny@v1"): folder / "v1"}) as (
        address,
        _,
    ):
        client = {key: value for key, value in environment().items() if not key.endswith("_OFFLINE")}
        yield client | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "no_proxy": "127.0.0.1"}, folder


def run_python(hub, *args, **more):
    return subprocess.run(
        [sys.executable, *args], cwd=PROJECT, env=hub[0] | more, capture_output=True, text=True, timeout=120
    )


def ask(hub, *names, **more):
    done = run_python(hub, "-c", ASK, json.dumps(names), **more)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def first_weight(folder):
    weights = load_file(folder / "model.safetensors")
    return next(value for name, value in weights.items() if "embed_tokens" in name)[0, 0].item()


def test_a_branch_and_a_commit_give_their_weights_and_tokenizer(hub):
    """The control: without a revision they are others. What was fetched serves without the hub."""
    names = ["user/tiny", "user/tiny@v1", f"user/tiny@{V1}", "user/tiny@v2"]
    main, branch, commit, unknown = ask(hub, *names)
    assert main == [COMMIT, first_weight(hub[1] / "main")]
    assert branch == commit == [V1, first_weight(hub[1] / "v1")] and branch[1] != main[1]
    assert unknown.startswith("model_revision: there is no 'v2' of 'user/tiny' on the hub (http://127.0.0.1:")
    offline = ask(hub, *names, HF_ENDPOINT="http://127.0.0.1:9")
    assert offline[:3] == [main, branch, commit] and "cannot be reached" in offline[3]


@pytest.fixture(scope="module")
def trained(hub):
    """A LoRA run of one step on branch v1."""
    words = {
        "model": "user/tiny",
        "model_revision": "v1",
        "lora_r": 2,
        "data": hub[1] / "rows.jsonl",
        "answer_column": "null",
        "rewards": json.dumps({f"{hub[1]}/rewards.py:varied": 1.0}),
        "reward_workers": 0,
        "max_steps": 1,
        "max_prompt_length": 32,
        "max_generate_length": 8,
        "num_threads": 1,
        "device": "cpu",
        "report_to": "none",
        "output_dir": hub[1] / "output",
        "runs_dir": hub[1] / "runs",
    }
    done = run_python(hub, "train.py", *(str(word) for name, value in words.items() for word in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("model user/tiny@v1: ")
    return hub[1] / "output" / "checkpoint_1"


def test_the_checkpoint_names_it_and_opens_on_it(hub, trained):
    """An adapter is nothing without its base: with main's weights it would be another model."""
    state = read_state(trained)
    assert state["config"]["model_revision"] == "v1" and state["model_commit"] == V1
    adapter = json.loads((trained / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("user/tiny", "v1")
    assert base_of(trained) == "user/tiny@v1"
    [[_, weight]] = ask(hub, str(trained))
    assert weight == first_weight(hub[1] / "v1")


def test_a_resume_needs_the_same_one(trained):
    state = read_state(trained)
    facts = {name: state[name] for name in ("base_model", "model_commit")}
    cfg = Config(**{**state["config"], "lora_r": 2})
    check_same_run(trained, state, cfg, facts)
    other = dataclasses.replace(cfg, model_revision="v2")
    with pytest.raises(UserError, match="model_revision: 'v1' there, 'v2' now"):
        check_same_run(trained, state, other, facts | {"model_commit": COMMIT})
    check_same_run(trained, state, dataclasses.replace(cfg, model_revision=V1), facts)  # another name of that commit
    moved = facts | {"model_commit": COMMIT}
    with pytest.raises(UserError, match=f"the base model's commit was {V1}, which is {COMMIT} now: name the first"):
        check_same_run(trained, state, cfg, moved)
    whole = dataclasses.replace(cfg, lora_r=0)
    check_same_run(trained, {**state, "config": dataclasses.asdict(whole)}, whole, moved)  # its weights are in it
    older = {name: value for name, value in state.items() if name != "model_commit"}
    check_same_run(trained, older, cfg, facts)


@pytest.mark.parametrize(
    "model, revision, said",
    [
        ("demo/base", "main", "model_revision: 'main' is of a model on the hub, demo/base is a folder"),
        ("./gone", "main", "is of a model on the hub, ./gone is a folder"),
        ("user/tiny@v1", "v1", "'user/tiny@v1' names a revision already"),
        ("user/tiny", "../../x", "must be a branch, a tag or a commit, got '../../x'"),
        ("user/tiny", "-x", "must be a branch"),
        ("user/tiny", "a b", "must be a branch"),
    ],
)
def test_wrong_ones_are_refused_at_the_start(model, revision, said):
    with pytest.raises(UserError, match=r"^model_revision: ") as caught:
        check(Config(model=model, model_revision=revision, **GOOD))
    assert said in str(caught.value)


def test_names_of_branches_with_slashes():
    cfg = Config(model="user/tiny", model_revision="refs/pr/3", **GOOD)
    check(cfg)
    assert model_name(cfg) == "user/tiny@refs/pr/3" and model_name(Config(model="user/tiny")) == "user/tiny"


@pytest.mark.parametrize("revision, fits", [(None, True), ("v1", True), ("../x", False), (3, False), ("a\nb", False)])
def test_an_adapters_revision_is_checked(trained, tmp_path, revision, fits):
    for path in trained.glob("adapter_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": revision}))
    if fits:
        check_adapter(Path(tmp_path))
    else:
        with pytest.raises(ValueError, match="revision is"):
            check_adapter(Path(tmp_path))
