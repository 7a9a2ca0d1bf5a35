"""Models and data by hub name, from a hub on this machine; and what is said when it refuses or is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.launcher import PROJECT, environment
from tests.support.local_hub import COMMIT, local_hub
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

NOWHERE = "http://127.0.0.1:9"  # a port that nothing listens on
ASK = """
import json, sys
from grpo.data.sources import load_rows
from grpo.errors import UserError
from grpo.models.checks import quiet
from grpo.models.loading import load_tokenizer, resolve
quiet()
for kind, name in json.loads(sys.argv[1]):
    try:
        if kind == "data":
            print(json.dumps(load_rows(name, "test").to_list()))
        else:
            print(json.dumps([len(load_tokenizer(name)), resolve(name)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def rows_of(split):
    return [{"question": f"{split} {i}?", "answer": f"0{i}"} for i in range(6)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(address, requests, folder for the clients' caches)"""
    folder = tmp_path_factory.mktemp("hub")
    model = save_tiny(folder / "model")
    (model / "pytorch_model.bin").write_bytes(b"never fetched")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")
    pickled = save_tiny(folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hostile = save_tiny(folder / "hostile")
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "run.Me"}}))
    data = folder / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(split)))
    sharded = save_tiny(folder / "sharded")
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(sharded, max_shard_size="40KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    adapter = folder / "adapter"
    trained = get_peft_model(tiny_model("qwen3"), LoraConfig(target_modules="all-linear"))
    trained.peft_config["default"].base_model_name_or_path = "user/tiny"
    trained.save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    packed = folder / "packed"
    packed.mkdir()
    (packed / "model-q4.gguf").write_bytes(b"GGUF")
    more = {("models", "user/sharded"): sharded, ("models", "user/adapter"): adapter, ("models", "user/packed"): packed}
    there = {
        ("models", "user/tiny"): model,
        ("models", "user/pickled"): pickled,
        ("models", "user/hostile"): hostile,
        ("datasets", "user/questions"): data,
        **more,
    }
    with local_hub(there, gated={"user/gated"}) as (address, asked):
        yield address, asked, folder


def run_python(hub, *args, address=None):
    env = {key: value for key, value in environment().items() if not key.endswith("_OFFLINE")}
    env |= {"HF_ENDPOINT": address or hub[0], "HF_HOME": str(hub[2] / "home")}
    env |= {"HF_TOKEN_PATH": str(hub[2] / "none"), "no_proxy": "127.0.0.1"}
    return subprocess.run([sys.executable, *args], cwd=PROJECT, env=env, capture_output=True, text=True, timeout=120)


def ask(hub, wanted, **where):
    """What each of these gives in one process: rows, facts of a model, or the refusal."""
    done = run_python(hub, "-c", ASK, json.dumps(wanted), **where)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def train(hub, out, *args):
    settings = (
        "--rewards",
        '{"mark_reward": 1}',
        "--max_steps",
        "1",
        "--max_prompt_length",
        "32",
        "--num_threads",
        "1",
        "--max_generate_length",
        "8",
        "--output_dir",
        str(out),
        "--runs_dir",
        str(out / "runs"),
        "--report_to",
        "none",
        "--device",
        "cpu",
    )
    return run_python(hub, "train.py", *args, *settings)


def test_a_run_from_the_hub_and_again_without_it(hub, tmp_path):
    done = train(
        hub,
        tmp_path,
        "--model",
        "user/tiny",
        "--data",
        "user/questions",
        "--data_split",
        "train",
        "--eval_data",
        "user/questions",
        "--eval_rows",
        "4",
    )
    lines = done.stderr.splitlines()  # the random model gets no reward
    assert done.returncode == 0 and all(line.startswith("warning: nothing was learned") for line in lines), lines
    assert "6 questions kept" in done.stdout and "held-out after 1 steps" in done.stdout
    assert (tmp_path / "checkpoint_1" / "model.safetensors").is_file()
    fetched = [line for line in hub[1] if line.startswith("GET") and "/resolve/" in line]
    assert any(line.endswith(f"user/tiny/resolve/{COMMIT}/model.safetensors") for line in fetched)
    assert not any("pytorch_model" in line or "onnx" in line for line in fetched)

    wanted = [["data", "user/questions"], ["model", "user/tiny"], ["data", "user/other"], ["model", "user/other"]]
    (rows, (size, folder), no_data, no_model), stderr = ask(hub, wanted, address=NOWHERE)
    assert rows == rows_of("test") and size > 256 and folder.endswith(COMMIT)  # what was fetched serves
    assert no_data.startswith("data: 'user/other' is no local file") and "cannot be reached" in no_data
    assert no_model.startswith("model: 'user/other' is no local file") and "cannot be reached" in no_model
    [note] = stderr.splitlines()  # and not a line for every retry of every library
    assert note.startswith(f"note: the hub ({NOWHERE}) cannot be reached (")


WANTED = [["model", "user/sharded"], ["model", "user/adapter"]]
REFUSED = [
    ["model", "user/nothing"],
    ["model", "user/gated"],
    ["data", "user/gated"],
    ["model", "user/pickled"],
    ["model", "user/hostile"],
    ["model", "user/packed"],
    ["data", "json"],
    ["data", "no such/na me"],
]


@pytest.fixture(scope="module")
def answers(hub):
    """What one process gets for WANTED and for REFUSED, and its stderr."""
    found, stderr = ask(hub, WANTED + REFUSED)
    return found[: len(WANTED)], found[len(WANTED) :], stderr


def test_shards_and_adapters_are_fetched_after_their_tokenizer(answers):
    """The tokenizer comes first, without weights: an index whose shards are not there yet is no damage."""
    [sharded, adapter], _, _ = answers
    assert isinstance(sharded, list) and isinstance(adapter, list), (sharded, adapter)
    found = {path.name for path in Path(sharded[1]).iterdir()}
    assert len([name for name in found if name.startswith("model-0000")]) > 1, found
    assert {path.name for path in Path(adapter[1]).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_name_that_is_not_there_ends_a_run_in_one_line(hub, tmp_path):
    done = train(hub, tmp_path, "--model", "user/tiny", "--data", "user/nothing")
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("error: data: there is no dataset 'user/nothing' on the hub (http://127.0.0.1:"), line


def test_refusals(answers):
    _, said, stderr = answers
    starts = [
        "model: there is no model 'user/nothing' on the hub (http://127.0.0.1:",
        "model: 'user/gated' is gated: its owner decides who gets it. Ask for access",
        "data: 'user/gated' is gated: its owner decides",
        "model: 'user/pickled' on the hub is not opened: its weights are a pickle (pytorch_model.bin), which could run",
        "model: 'user/hostile' is not opened: config.json: it wants to run code of its own (auto_map)",
        "model: 'user/packed' on the hub holds GGUF files. Download one, with `hf download user/packed model-q4.gguf`",
        "data: there is no dataset 'json' on the hub",
        "data: 'no such/na me' is no file, no folder and no name on the hub",
    ]
    assert len(said) == len(starts) and not stderr
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(start) and "\n" not in line, line
