"""push_to_hub: what arrives at a hub on this machine, and that no hub changes or ends a run."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

from grpo.checkpoints.manifest import verify, write_manifest
from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.config.sft_section import stage_values
from grpo.errors import UserError
from grpo.evaluate.ask import CheckpointModel
from grpo.models import upload
from grpo.run.pushing import Pusher, check_push
from tests.support.accepting_hub import TOKEN, accepting_hub, commits, sent
from tests.support.launcher import PROJECT, fork_script, metrics_of, patched_train
from tests.support.taught import taught_checkpoint

GOOD = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}}
SETTINGS = ["--max_prompt_length", "96", "--max_generate_length", "16"]


@pytest.fixture
def server(monkeypatch):
    with accepting_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Also for the processes that send; the token stands where users have it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return taught_checkpoint(tmp_path_factory.mktemp("taught") / "checkpoint_3", [("2+2?", {}, "4")], SETTINGS)


NOT_SENT = {f"trainer/{name}.safetensors" for name in ("optimizer-00000-of-00001", "reference", "questions", "ahead")}


@pytest.fixture
def checkpoint(taught, tmp_path):
    """A checkpoint with optimizer state, in an output_dir of its own."""
    folder = tmp_path / "output" / "checkpoint_3"
    (folder / "trainer").mkdir(parents=True)
    for path in taught.rglob("*"):
        if path.is_file() and path.name != "MANIFEST.json":
            (folder / path.relative_to(taught)).write_bytes(path.read_bytes())
    for name in NOT_SENT:
        (folder / name).write_bytes(b"state")
    write_manifest(folder, 3)
    return folder


def pusher_of(checkpoint, said, **more):
    cfg = Config(**{**GOOD, "data": "/home/mia/secret/q.jsonl", "push_to_hub": "mia/tiny", "run_name": "r", **more})
    config = {**dataclasses.asdict(cfg), "runs_dir": str(checkpoint.parents[1] / "runs")}
    return Pusher(cfg, config, checkpoint.parent, said.append)


def push(checkpoint, said, **more):
    pusher = pusher_of(checkpoint, said, **more)
    pusher.saved(checkpoint)
    pusher.finish(go_on=lambda: True)
    return pusher


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_model_and_its_card_arrive_in_one_commit(server, checkpoint, tmp_path, capfd):
    """Downloaded, it is a checkpoint that answers; no optimizer state, no path of this machine, no token."""
    (tmp_path / "runs" / "r").mkdir(parents=True)
    lines = [{"step": step, "reward/mean": step / 10} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text(text + '{"step": 4, "rewa')  # a line is being written
    before, said = files_in(checkpoint), []
    push(checkpoint, said)
    assert said == ["pushed checkpoint_3 to mia/tiny"] and files_in(checkpoint) == before
    assert not list(checkpoint.parent.glob(".push-*")) and capfd.readouterr() == ("", "")
    files = sent(server)
    assert {name for name in before if name not in files} == NOT_SENT
    assert {name for name in files if files[name] != before.get(name)} == {
        "README.md",
        "MANIFEST.json",
        "trainer/state.json",
    }
    assert all(b"/home/mia" not in content and TOKEN.encode() not in content for content in files.values())
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["library_name"], header["tags"]) == ("transformers", ["grpo", "reinforcement-learning"])
    assert "| 3 | 0.3 |" in card and "| 4 |" not in card and "step 3." in card
    [created] = [json.loads(body) for path, _, body in server.seen if path == "/api/repos/create"]
    assert created.get("private", created.get("visibility") == "private") is True
    downloaded = tmp_path / "downloaded"
    for name, content in files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert verify(downloaded) is None
    model = CheckpointModel(downloaded, torch.device("cpu"), {"temperature": 0.0})
    assert model.ask(model.encode("2+2?")).text == "4"


def test_a_supervised_checkpoint_says_so(server, checkpoint):
    push(checkpoint, [], sft={"solution_column": "s"})
    text = sent(server)["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["sft"] and "Group Relative" not in text


def refuse(server, monkeypatch, checkpoint, what):
    """Set the hub up so that a push fails; what the warning says."""
    if what == "down":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        return ""
    if what == "hangs":
        server.hang = "/commit/"
        return "push_timeout_s 3"
    if what == "damaged":
        (checkpoint / "MANIFEST.json").write_text("{")
        return "could not be linked"
    server.refuse["/api/repos/create" if what == 401 else "/commit/"] = what
    return str(what)


@pytest.mark.parametrize("what", [401, 403, 500, "down", "hangs", "damaged"])
def test_a_push_that_fails_is_one_warning(server, checkpoint, monkeypatch, capfd, what):
    """The checkpoint stays, nothing is left, and the token is not shown, though the hub sends it back."""
    expected, said = refuse(server, monkeypatch, checkpoint, what), []
    before = files_in(checkpoint)
    began = time.monotonic()
    push(checkpoint, said, push_timeout_s=3.0 if what == "hangs" else 60.0)
    assert (time.monotonic() - began < 60 and said == [] and commits(server) == []) or what in ("hangs", 403, 500)
    shown = capfd.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith("warning: push_to_hub: checkpoint_3 was not sent to mia/tiny: ") and expected in line
    assert f"--checkpoint {checkpoint} --to merged_16bit" in line and shown.out == ""
    assert TOKEN not in line and files_in(checkpoint) == before
    assert not list(checkpoint.parent.glob(".push-*"))


def test_a_push_that_fails_as_the_run_gives_up_is_said_once(server, checkpoint, monkeypatch, capfd):
    """The thread says that it took too long; its staged folder takes until after the run's own limit to be removed."""
    server.hang, said = "/commit/", []
    removed = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **how: (time.sleep(6), removed(*args, **how)))
    pusher = pusher_of(checkpoint, said, push_timeout_s=3.0)
    pusher.saved(checkpoint)
    assert server.hung.wait(60)
    time.sleep(0.5)
    pusher.finish(go_on=lambda: True)
    [line] = capfd.readouterr().err.splitlines()
    assert "longer than push_timeout_s 3" in line or "not within push_timeout_s 3" in line


@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_killed_process_is_one_warning_and_the_next_push_arrives(server, checkpoint, capfd, how):
    server.hang, said = "/commit/", []
    pusher = pusher_of(checkpoint, said, push_timeout_s=60.0 if how == "killed" else 3.0)
    pusher.saved(checkpoint)
    assert server.hung.wait(60)
    if how == "killed":
        os.kill(pusher.process.pid, signal.SIGKILL)
    server.hang, began = None, time.monotonic()
    while pusher.busy:
        assert time.monotonic() - began < 20
        time.sleep(0.02)
    pusher.saved(checkpoint)
    pusher.finish(go_on=lambda: True)
    [line] = capfd.readouterr().err.splitlines()
    assert ("its process was killed" if how == "killed" else "longer than push_timeout_s 3") in line and said == [
        "pushed checkpoint_3 to mia/tiny"
    ]


def test_of_checkpoints_saved_meanwhile_the_newest_is_next(server, checkpoint):
    """Also when save_total_limit has removed the one under way and the one that waits."""
    server.hang, said = "/commit/", []
    pusher = pusher_of(checkpoint, said)
    pusher.saved(checkpoint)
    assert server.hung.wait(60)
    for step in (4, 5):
        folder = checkpoint.with_name(f"checkpoint_{step}")
        shutil.copytree(checkpoint, folder)
        write_manifest(folder, step)
        pusher.saved(folder)
        shutil.rmtree(folder)
    weights = (checkpoint / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoint)
    server.hang = None
    server.released.set()  # the first commit is dropped
    pusher.finish(go_on=lambda: True)
    assert said == ["pushed checkpoint_5 to mia/tiny"]
    assert len(commits(server)) == 2 and commits(server)[-1]["model.safetensors"] == weights
    assert json.loads(commits(server)[-1]["MANIFEST.json"])["step"] == 5


def test_a_request_to_stop_ends_the_wait(server, checkpoint, capfd):
    server.hang = "/commit/"
    pusher = pusher_of(checkpoint, [])
    pusher.saved(checkpoint)
    assert server.hung.wait(60)
    process, began = pusher.process, time.monotonic()
    pusher.finish(go_on=lambda: False)
    assert time.monotonic() - began < 5 and process.poll() is not None
    assert "checkpoint_3 was not sent" in capfd.readouterr().err


def test_the_process_ends_when_its_stdin_does(server, tmp_path):
    """The control: until then it waits for the hub."""
    (tmp_path / "README.md").write_text("x")
    server.hang = "/commit/"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "grpo.models.upload"], cwd=PROJECT, **pipes)
    job = {"folder": str(tmp_path), "repo": "mia/tiny", "message": "m"}
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    assert server.hung.wait(60) and process.poll() is None
    process.stdin.close()
    assert process.wait(10) == 1 and process.stdout.read() == b""


@pytest.mark.full
def test_the_process_ends_with_the_trainer(server, checkpoint, tmp_path):
    """Killed with SIGKILL, which nothing can react to."""
    server.hang = "/commit/"
    code = (
        "import sys, time; from pathlib import Path; from grpo.config.settings import Config\n"
        "from grpo.run.pushing import Pusher\n"
        "pusher = Pusher(Config(push_to_hub='mia/tiny'), {}, Path(sys.argv[1]).parent, print)\n"
        "pusher.saved(Path(sys.argv[1]))\n"
        "while pusher.process is None: time.sleep(0.02)\n"
        "print(pusher.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(checkpoint)], cwd=PROJECT, stdout=subprocess.PIPE)
    sender = int(trainer.stdout.readline())
    assert server.hung.wait(60) and Path(f"/proc/{sender}").exists()
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{sender}").exists() and "Z" not in Path(f"/proc/{sender}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


# --- settings


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../x", "mia/ti ny", "mia/a--b", "mia/a.git", "/mia", "https://x/y"])
def test_names_that_no_repository_can_have(name):
    with pytest.raises(UserError, match=r"^push_to_hub: must be user/name of letters"):
        check(Config(**GOOD, push_to_hub=name))


def test_what_could_never_be_sent_is_refused_at_the_start(monkeypatch, tmp_path):
    cfg = Config(**GOOD, push_to_hub="mia/tiny")
    check_push(cfg)
    check_push(dataclasses.replace(cfg, lora_r=2, model="user/base"))
    with pytest.raises(UserError, match=r"^push_to_hub: an adapter names its base, here demo/base, a folder of this"):
        check_push(dataclasses.replace(cfg, lora_r=2, model="demo/base"))
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"^push_to_hub: no token. Set HF_TOKEN"):
        check_push(cfg)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^push_to_hub: HF_HUB_OFFLINE is set"):
        check_push(cfg)
    check_push(Config(**GOOD))  # without it nothing is asked


def test_the_stage_before_has_a_repository_of_its_own():
    values = {"push_to_hub": "mia/tiny", "output_dir": "o", "run_name": None}
    assert stage_values(values, {})["push_to_hub"] == "mia/tiny_sft"
    assert stage_values(values, {"push_to_hub": "mia/other"})["push_to_hub"] == "mia/other"
    assert stage_values({**values, "push_to_hub": None}, {})["push_to_hub"] is None


# --- whole runs

PATCH = """
import os
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = False
os.environ.update({environment!r})
"""


def train(folder, *words, nproc=None, **environment):
    """Two steps of the demo, each saved."""
    folder.mkdir()
    program = patched_train(folder, PATCH.format(environment={"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, **environment}))
    settings = ["--config", "configs/demo.yaml", "--max_steps", "2", "--save_steps", "1", "--eval_rows", "4"]
    places = ["--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs"), "--save_total_limit", "1"]
    return fork_script(program, *settings, *places, "--num_threads", "1", *words, nproc=nproc)


def measured(folder):
    """The metrics, but for what a clock measures."""
    clocks = ("time/", "save/", "idle/", "tokens_per_s")
    lines = metrics_of(folder / "runs")
    return [{name: value for name, value in line.items() if not name.startswith(clocks)} for line in lines]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "run"
    assert train(folder).returncode == 0
    return measured(folder)


def test_a_run_pushes_and_is_the_same_run(server, tmp_path, without):
    """On two processes; at the end the last checkpoint has arrived. A resume of the complete run sends nothing."""
    done = train(tmp_path / "run", "--push_to_hub", "mia/tiny", nproc=2, HF_ENDPOINT=os.environ["HF_ENDPOINT"])
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "run" / "runs" / "demo" / "train.log").read_text()
    assert "pushed checkpoint_2 to mia/tiny" in done.stdout and "pushed checkpoint_2 to mia/tiny" in log
    assert TOKEN not in done.stdout + done.stderr + log
    assert [sorted(line) for line in measured(tmp_path / "run")] == [sorted(line) for line in without]
    last = commits(server)[-1]
    assert json.loads(last["MANIFEST.json"])["step"] == 2
    assert (
        last["model.safetensors"] == (tmp_path / "run" / "output" / "checkpoint_2" / "model.safetensors").read_bytes()
    )
    assert not list((tmp_path / "run" / "output").glob(".push-*"))


@pytest.mark.parametrize(
    "what", ["hangs", *(pytest.param(what, marks=pytest.mark.full) for what in (401, 500, "down"))]
)
def test_no_hub_changes_a_run_or_ends_it(server, tmp_path, monkeypatch, without, what):
    refuse(server, monkeypatch, tmp_path, what)
    words = ["--push_to_hub", "mia/tiny", "--push_timeout_s", "3"]
    done = train(tmp_path / "run", *words, HF_ENDPOINT=os.environ["HF_ENDPOINT"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path / "run") == without
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("warning: push_to_hub: checkpoint_") for line in lines), lines
    assert TOKEN not in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "output" / "exit.json").read_text())["code"] == 0
