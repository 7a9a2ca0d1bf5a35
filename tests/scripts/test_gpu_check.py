"""A dry run of benchmarks/gpu_check.sh on a CPU, so that no minute on a GPU is lost to a slip."""

import json
import subprocess
import sys

import pytest

from tests.support.launcher import PROJECT, environment

SHORT = ("environment", "gradients", "attention", "step")


def checked(folder, *words):
    command = ["bash", "benchmarks/gpu_check.sh", "--device", "cpu", "--out", str(folder), *words]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = (folder / "gpu_check.jsonl").read_text(encoding="utf-8").splitlines()
    return done, {one["part"]: one for one in map(json.loads, lines)}


@pytest.mark.parametrize("parts", [SHORT, pytest.param((), marks=pytest.mark.full)], ids=["the first parts", "all"])
def test_a_dry_run_passes_on_a_cpu(parts, tmp_path):
    done, found = checked(tmp_path, *(("--only", *parts) if parts else ()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert set(parts) <= set(found) and not any("failed" in one for one in found.values())
    assert 0 < found["gradients"]["fp32 shared"] < 1e-5 < found["gradients"]["bf16 shared"] < 0.1
    if not parts:
        assert len(found) == 10 and "tests collected" in found["tests"]["pytest"]


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    done, found = checked(tmp_path, "--only", "real", "environment", "--model", str(tmp_path / "nothing.gguf"))
    assert done.returncode == 1
    assert "nothing.gguf" in found["real"]["failed"] and found["environment"]["torch"] in done.stdout
