"""benchmarks/gpu_check.sh: a dry run on a CPU, so that no minute on a GPU is lost to a slip, and what ends a part."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_check, shared_gpu
from benchmarks.gpu_parts import RUNS, gpu_tests
from grpo.errors import UserError
from grpo.runtime import distributed
from tests.support.launcher import PROJECT, environment, fork_script

FORKED = (
    "environment",
    "attention_bf16",
    "attention_fp32",
    "step",
    "graphs",
    "gradients",
    "tests",
)  # no run of train.py


def command_of(*words):
    return ["bash", "benchmarks/gpu_check.sh", "--out", *map(str, words)]


def checked(command, folder, **variables):
    """What it printed, and what it found, by part."""
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**environment(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done, findings(folder / "gpu_check.jsonl")


def findings(file):
    """By part."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a part that was killed may leave half a line
            one = json.loads(line)
            found.setdefault(one.pop("part"), {}).update(one)
    return found


def assert_right(found):
    """What the parts without a run of train.py find on a CPU."""
    assert found["environment"]["train.py"] == "can be imported" and found["environment"]["GB/s"] > 0
    assert 0 < found["gradients"]["fp32 shared"] < 1e-5 < found["gradients"]["bf16 shared"] < 0.1
    for dtype in ("bf16", "fp32"):
        assert found[f"attention_{dtype}"]["heads of Qwen3-0.6B"].startswith("fused kernel CpuFlash")
        assert found[f"attention_{dtype}"]["2x2x8x16 ms, MB"]["s ours/rows"] > 0
    for phase in ("rollout", "update", "whole step"):
        assert found["step"][phase]["x"] > 1, "slower than its floor"
    assert found["graphs"]["first 8 tokens alike"] == 1
    assert found["tests"]["collected"] > 40


def test_parts_without_a_run_pass_on_a_cpu(tmp_path):
    words = ("--device", "cpu", "--findings", str(tmp_path / "found"), "--shared", str(tmp_path))
    for part in FORKED:
        done = fork_script("benchmarks.gpu_parts", *words, part)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert_right(findings(tmp_path / "found"))


@pytest.mark.full
def test_a_dry_run_passes_on_a_cpu(tmp_path):
    done, found = checked(command_of(tmp_path, "--device", "cpu", "--budget", 800), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert set(found) == set(gpu_check.PARTS)
    assert_right(found)
    assert found["ranks"]["1 ranks"] == pytest.approx(found["ranks"]["2 ranks"], rel=2e-3)
    assert found["real"]["step"] > 0 and 0 <= found["demo"]["before"] <= 1
    assert "TRL" in found["trl"] or found["trl"]["TRL's over ours"]["whole step"] > 0


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    words = ("--device", "cpu", "--only", "real", "attention_fp32", "--model", tmp_path / "nothing.gguf")
    done, found = checked(command_of(tmp_path, *words), tmp_path)
    assert done.returncode == 1
    assert "code 1" in found["real"]["failed"] and "nothing.gguf" in (tmp_path / "gpu_check.log").read_text()
    assert "failed" not in found["attention_fp32"] and "fused kernel CpuFlash" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {f"gpu_check.{kind}" for kind in ("jsonl", "md", "log")}
    assert (tmp_path / "gpu_check.md").read_text() in done.stdout


FAKE = '''
"""The check with other parts, and those parts."""
import atexit, json, os, signal, subprocess, sys, time
from pathlib import Path

def main():
    from benchmarks import gpu_check
    from benchmarks.gpu_check import Part
    gpu_check.MODULE = "fake_parts"
    gpu_check.PARTS = {
        "leaves": Part(20), "dies": Part(20), "one": Part(40, True), "other": Part(40, True), "hangs": Part(15),
        "late": Part(1000),
    }
    sys.exit(gpu_check.main())

def say(**found):
    with open(sys.argv[sys.argv.index("--findings") + 1], "a") as file:
        file.write(json.dumps({"part": sys.argv[-1]} | found) + "\\n")

def grandchild():
    """In a session of its own, as torchrun's workers are; it holds this part's output open."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(os.environ["PIDS"], sys.argv[-1]).write_text(str(process.pid))

def part():
    name = sys.argv[-1]
    say(begun=1)
    print(name, "prints", flush=True)
    if name in ("leaves", "hangs"):
        grandchild()
    if name == "leaves":
        atexit.register(print, '["a line that is no finding"]')
    if name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        with open(sys.argv[sys.argv.index("--findings") + 1], "a") as file:
            file.write('{"part": "han\\n')
        time.sleep(600)
    if name in ("one", "other"):
        Path(os.environ["PIDS"], name).touch()
        end = time.monotonic() + 30
        while not all(Path(os.environ["PIDS"], each).exists() for each in ("one", "other")):
            assert time.monotonic() < end, "they do not run at once"
            time.sleep(0.05)

main() if sys.argv[1] == "--out" else part()
'''


@pytest.fixture
def fake(tmp_path):
    """The command with parts that misbehave, its environment, its folder."""
    (tmp_path / "fake_parts.py").write_text(FAKE)
    folder = tmp_path / "out"
    variables = {"PYTHONPATH": f"{tmp_path}:{PROJECT}", "PIDS": str(tmp_path)}
    return [sys.executable, "-m", "fake_parts", "--out", str(folder)], variables, folder


def runs(file):
    """Whether the process that a file names is still there."""
    try:
        return Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_that_misbehaves_costs_the_others_nothing(fake, tmp_path):
    command, variables, folder = fake
    done, found = checked([*command, "--budget", "100"], folder, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert all(one["begun"] == 1 for name, one in found.items() if name != "late")
    assert not {"failed", "skipped"} & {*found["leaves"], *found["one"], *found["other"]}
    assert found["leaves"]["seconds"] < 15 and not runs(tmp_path / "leaves")
    assert found["dies"]["failed"] == "code -11: dies prints"
    assert 15 <= found["hangs"]["seconds"] < 40
    assert found["hangs"]["failed"] == "not done in 15 s" and not runs(tmp_path / "hangs")
    assert found["late"]["skipped"].endswith("s are left of 100")
    assert "hangs          | hangs prints" in (folder / "gpu_check.log").read_text()
    assert "| late |  | skipped" in done.stdout and "| dies |" in (folder / "gpu_check.md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ended_from_outside_it_leaves_nothing_behind(fake, tmp_path):
    command, variables, folder = fake
    process = subprocess.Popen([*command, "--only", "hangs"], cwd=PROJECT, env={**environment(), **variables})
    end = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() or not (tmp_path / "hangs").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM and not runs(tmp_path / "hangs")
    assert '"begun": 1' in (folder / "gpu_check.jsonl").read_text()


def test_every_part_is_there_and_every_file_with_tests_for_a_gpu():
    assert list(RUNS) == list(gpu_check.PARTS)
    assert all(f"    {name} " in gpu_check.__doc__ for name in RUNS)
    files = {"scripts/test_gpu.py", "forward/test_fused_attention.py", "rollout/vllm/test_group.py"}
    assert {f"tests/{file}" for file in files} < set(gpu_tests()), "the mark is found, also as a module's"
    assert len(gpu_tests()) < 12, "not the whole of tests/"


def test_two_ranks_share_a_gpu_in_the_check_alone(monkeypatch):
    """The control: train.py itself refuses the second rank."""
    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "set_threads", lambda *given: None)
    monkeypatch.setattr(distributed, "pick_device", distributed.pick_device)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: joined.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda **how: None)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="local rank 1 has no GPU of its own"):
        distributed.start("cuda")
    shared_gpu.share_gpu()
    world = distributed.start("cuda")
    assert (world.device, world.rank, joined) == (torch.device("cuda", 0), 1, ["gloo"])
