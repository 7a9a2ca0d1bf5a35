"""A checkpoint that an earlier version wrote resumes and answers as it did there.

written_by_3865586/ holds the checkpoint after 3 steps, its base model, data and rewards, and in expected.json what
commit 3865586 itself measured in steps 4 and 5 and answered from the checkpoint. Settings that this checkpoint does not
know count as their defaults.
"""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

import pytest

import reward_func
from tests.support.launcher import fork_script, metrics_of

KEPT = Path(__file__).with_name("written_by_3865586")
EXPECTED = json.loads((KEPT / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(KEPT, tmp_path / "kept")
    return tmp_path / "kept"


def test_it_resumes_and_measures_the_same(folder):
    """Losses and gradient norms of 16 sampled rows: another token, weight or moment shows in the first digits."""
    done = fork_script("train.py", "--config", "task.yaml", "--max_steps", "5", "--num_threads", "1", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from output/checkpoint_3" in done.stdout
    steps = [line for line in metrics_of(folder / "runs") if "loss" in line]
    assert [line["step"] for line in steps] == [4, 5]
    for expected, found in zip(EXPECTED["metrics"], steps, strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_another_reward_is_refused(folder):
    """The control: the resume above compares fingerprints, and this one differs."""
    file = folder / "rewards.py"
    file.write_text(file.read_text().replace("1 - len", "2 - len"))
    done = fork_script("train.py", "--config", "task.yaml", "--max_steps", "5", "--num_threads", "1", cwd=folder)
    assert done.returncode == 2
    assert "reward_source has changed" in done.stderr


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_it_answers_the_same(folder, temperature):
    done = fork_script(
        "inference.py",
        "--checkpoint",
        "output/checkpoint_3",
        "--device",
        "cpu",
        "--json",
        "--seed",
        "3",
        "--temperature",
        temperature,
        EXPECTED["question"],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["answer"] == EXPECTED["answers"][temperature]


@pytest.mark.parametrize("name", EXPECTED["reward_sources"])
def test_the_text_of_reward_functions_is_the_same(name):
    """It is part of a run's fingerprint: older runs that use a function could not resume after it was reformatted."""
    source = inspect.getsource(getattr(reward_func, name))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == EXPECTED["reward_sources"][name]
