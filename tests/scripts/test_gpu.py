"""Whole runs on a GPU: the numbers are those of the CPU, a run resumes, answers and is evaluated, several ranks agree.

    pytest -m gpu

GRPO_TEST_DEVICE=cpu runs the same tests without one, CPU against CPU: that shows that the tests work.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.launcher import PROJECT, environment, metrics_of, run_script

DEVICE = os.environ.get("GRPO_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.full] if DEVICE == "cpu" else [pytest.mark.gpu]
SETTINGS = {
    "model": "demo/base",
    "data": "demo/train.jsonl",
    "answer_format": "hash",
    "prompt_template": "{question}\n",
    "rewards": '{"final_answer_reward": 1.0}',
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_prompt_length": 96,
    "max_generate_length": 80,
    "chat_template": False,
    "beta": 0.05,
    "max_steps": 4,
    "save_steps": 2,
    "lr": 5e-5,
    "run_name": "run",
    "eval_data": "demo/test.jsonl",
    "eval_rows": 32,
}


def train(folder, device, nproc=None, **settings):
    """train.py to its end on a device; its metrics, step by step."""
    words = {**SETTINGS, **settings, "device": device, "output_dir": folder / "output", "runs_dir": folder / "runs"}
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    done = run_script("train.py", *flags, nproc=nproc, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"x {device}" in done.stdout and "kernel by kernel" not in done.stdout + done.stderr
    return [row for row in metrics_of(folder / "runs") if "grad_norm" in row]


def near(expected, found, rel):
    """Numbers of the first step, when weights are equal; later ones drift with rounding."""
    for name in ("reward/mean", "completions/length_mean", "grad_norm", "entropy"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=rel, abs=1e-3), name
    assert all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in found)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Metrics of the run on the CPU."""
    return train(tmp_path_factory.mktemp("cpu"), "cpu")


def test_a_run_in_fp32_is_that_of_the_cpu(on_cpu, tmp_path):
    found = train(tmp_path, DEVICE)
    assert len(found) == SETTINGS["max_steps"]
    near(on_cpu, found, rel=0.02)  # a draw on an edge may differ
    resumed = train(tmp_path, DEVICE, max_steps=6)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]


def test_cuda_graphs_change_no_sample(tmp_path):
    with_graphs, without = (
        train(tmp_path / str(graphs), DEVICE, cuda_graphs=graphs, max_steps=2) for graphs in (True, False)
    )
    near(with_graphs, without, rel=0.02)


def test_rows_that_join_in_half_precision(on_cpu, tmp_path):
    found = train(tmp_path, DEVICE, dtype="bf16", rollout_tokens=3000, micro_batch_tokens=1000)
    near(on_cpu, found, rel=0.2)
    assert max(row["sampler_gap/mean"] for row in found) < 0.02, "one distribution, up to rounding"


def test_a_checkpoint_answers_and_is_evaluated(tmp_path):
    train(tmp_path, DEVICE)
    folder = str(tmp_path / "output" / "checkpoint_4")
    answered = run_script("inference.py", "--checkpoint", folder, "--json", "Tom has 5 eggs. He buys 3 and eats 2.")
    assert answered.returncode == 0 and '"answer"' in answered.stdout, answered.stdout + answered.stderr
    words = [
        sys.executable,
        "-m",
        "grpo.evaluate",
        "--checkpoint",
        folder,
        "--data",
        "demo/test.jsonl",
        "--limit",
        "20",
    ]
    judged = subprocess.run(words, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=600)
    assert judged.returncode == 0 and "Final accuracy" in judged.stdout, judged.stdout + judged.stderr


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "backend", [{"backend": "ddp"}, {"backend": "deepspeed", "zero_stage": 3}], ids=["ddp", "zero3"]
)
def test_two_ranks_are_one(backend, on_cpu, tmp_path):
    near(on_cpu, train(tmp_path, DEVICE, nproc=2, **backend), rel=0.02)
