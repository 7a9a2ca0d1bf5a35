"""Both stages as a user starts them: killed and resumed, one file for both, the ready configurations on tiny models."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.scripts.test_tasks import THOUGHT, save_model, save_rows
from tests.support.launcher import PROJECT, environment, fork_script
from tests.support.tiers import short
from tests.support.tiny import save_tiny

KILLED = """
import os, signal
import grpo.run.log
plain = grpo.run.log.RunLog.log_sft_step
def log(self, step, *rest):
    plain(self, step, *rest)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
grpo.run.log.RunLog.log_sft_step = log
"""
START = """
import sys
sys.path.insert(0, {project!r})
{patch}
from grpo.config.command_line import load_sft_config
from grpo.run.main import run_main
from grpo.sft.train import train_sft
sys.exit(run_main(train_sft, load_sft_config, sys.argv[1:]))
"""


def sft(folder, output, patch="", **settings):
    """The supervised stage on the demo's questions, in a process of its own."""
    flags = {
        "model": folder / "model",
        "data": PROJECT / "demo" / "train.jsonl",
        "data_rows": 40,
        "max_steps": 7,
        "solution_column": "answer",
        "answer_format": "hash",
        "prompt_template": "{question}\n",
        "batch_size": 4,
        "lr": 1e-3,
        "lr_schedule": "linear",
        "max_prompt_length": 96,
        "max_generate_length": 160,
        "save_steps": 3,
        "save_in_background": False,
        "output_dir": folder / output,
        "runs_dir": folder / "runs",
        "run_name": output,
        "num_threads": 1,
        "packing": True,
        "device": "cpu",
        **settings,
    }
    start = folder / "start.py"
    start.write_text(START.format(project=str(PROJECT), patch=patch))
    return fork_script(str(start), *(word for name, value in flags.items() for word in (f"--{name}", str(value))))


def weights(folder, step):
    return load_file(folder / f"checkpoint_{step}" / "model.safetensors")


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """And the same run in one go; then nothing is left to do, and GRPO does not take the folder for its own."""
    save_tiny(tmp_path / "model")
    whole = sft(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert sft(tmp_path, "halves", KILLED).returncode == -9
    assert not (tmp_path / "halves" / "checkpoint_7").exists()
    again = sft(tmp_path, "halves")
    assert again.returncode == 0 and "resuming from" in again.stdout and "checkpoint_3" in again.stdout, again.stderr
    one, two = weights(tmp_path / "whole", 7), weights(tmp_path / "halves", 7)
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    early = weights(tmp_path / "halves", 3)
    assert not all(torch.equal(one[name], early[name]) for name in one), "nothing was learned after the kill"
    rows = [json.loads(line) for line in (tmp_path / "runs" / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 8)]
    assert rows[0]["sft/loss"] > rows[-1]["sft/loss"] > 0 and 0 <= rows[-1]["sft/token_accuracy"] <= 1
    done = sft(tmp_path, "halves")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    other = sft(tmp_path, "halves", loss_on="all")
    assert other.returncode == 2 and "trained with other settings" in other.stderr and "sft:" in other.stderr
    grpo = fork_script(
        "train.py",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(PROJECT / "demo" / "train.jsonl"),
        "--rewards",
        '{"final_answer_reward": 1}',
        "--output_dir",
        str(tmp_path / "halves"),
        "--runs_dir",
        str(tmp_path / "runs"),
    )
    assert grpo.returncode == 2 and "trained with other settings" in grpo.stderr


BAD_LOSS = """
import math
import grpo.sft.policy
plain = grpo.sft.policy.SftPolicy.loss
def loss(self, *rest):
    return plain(self, *rest) * (math.nan if self.counters.step == 2 else 1.0)
grpo.sft.policy.SftPolicy.loss = loss
"""


@pytest.mark.full
def test_a_loss_that_is_not_finite_skips_the_update_and_can_be_looked_at(tmp_path):
    """Training goes on; the kept rows, packed ones, give a finite loss without the defect: another number, code 1."""
    save_tiny(tmp_path / "model")
    done = sft(tmp_path, "out", BAD_LOSS)
    assert done.returncode == 0 and done.stdout.count("update skipped on all ranks") == 1, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["guards/skipped_updates"] for row in rows] == [0, 0, 1, 1, 1, 1, 1]
    assert "grad_norm" not in rows[2] and rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    command = [sys.executable, "-m", "grpo.replay", str(tmp_path / "out" / "anomalies" / "step_3")]
    again = subprocess.run(command, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=200)
    assert again.returncode == 1 and "loss recorded nan, replayed" in again.stdout, again.stderr[-2000:]
    replayed = float(again.stdout.split("replayed ")[1].split()[0])
    assert 0 < replayed < 6


def both_stages(task, folder, nproc, twice):
    """The ready configuration with small numbers and a small file, through the script. Returns (process, output again).

    Again is the script once more where `twice` says so, else the two commands that it printed.
    """
    config = yaml.safe_load((PROJECT / "configs" / f"{task}.yaml").read_text(encoding="utf-8"))
    data = str(save_rows(task, folder))
    small = {
        "model": str(folder / "model"),
        "data": data,
        "max_steps": 2,
        "num_generations": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_prompt_length": 1200,
        "max_generate_length": 12,
        "dtype": "fp32",
        "lr": 1e-3,
        "device": "cpu",
        "backend": "ddp",
        "eval_split_size": 2,
        "num_threads": 1,
        "output_dir": str(folder / "out"),
        "runs_dir": str(folder / "runs"),
    }
    section = {name: value for name, value in config["sft"].items() if name not in ("epoch", "save_steps", "lr")}
    section |= {"max_steps": 3, "max_generate_length": 800, "lr": 1e-2, "lr_schedule": "constant"}
    if task == "dapo_math":
        rows = [
            {"problem": f"{n}+1?", "expected_answer": str(n + 1), "generated_solution": f"<think>{n}</think>"}
            for n in range(6)
        ]
        (folder / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section["data"] = str(folder / "solved.jsonl")
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump({**config, **small, "sft": section}), encoding="utf-8")
    command = ["bash", str(PROJECT / "launch" / "sft_then_grpo.sh"), str(nproc), "--config", str(file)]
    env = {**environment(), "GRPO_PYTHON": sys.executable}
    run = partial(subprocess.run, command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=400)
    first = run()
    if twice:
        again = run()
        assert again.returncode == 0, again.stderr[-2000:]
        return first, again.stdout
    stages = [line.split()[1:] for line in first.stdout.splitlines() if line.startswith("stage: ")]
    programs = [words[1:] if words[0] == "-m" else words for words in stages]
    return first, "".join(fork_script(*words, nproc=nproc).stdout for words in programs)


@pytest.mark.parametrize(
    ("task", "nproc"),
    short([("multiple_choice", 1), ("multiple_choice", 2), ("dapo_math", 1)], [("multiple_choice", 1)]),
)
def test_one_file_and_one_command_run_both_stages(tmp_path, task, nproc):
    """The second time there is nothing to do in either; GRPO starts from what was taught, with its prompt."""
    save_model(tmp_path / "model")
    first, again = both_stages(task, tmp_path, nproc, twice=nproc == 2)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    assert again.count("nothing to do") == 2, again[-2000:]
    taught, trained = tmp_path / "out_sft" / "checkpoint_3", tmp_path / "out" / "checkpoint_2"
    state = json.loads((trained / "trainer" / "state.json").read_text())
    assert state["config"]["model"] == str(taught) and state["config"]["sft"] == {}
    recipes = [json.loads((folder / "trainer" / "recipe.json").read_text()) for folder in (taught, trained)]
    assert recipes[0]["prompt_template"] == recipes[1]["prompt_template"]
    assert (taught / "chat_template.jinja").read_text() == (trained / "chat_template.jinja").read_text()
    own = json.loads((taught / "trainer" / "state.json").read_text())["config"]["sft"]
    wanted = {
        "multiple_choice": "<reasoning>\n{推理正確答案}\n</reasoning>\n<answer>\n{answer}\n</answer>",
        "dapo_math": "<start_working_out>{generated_solution}<end_working_out><SOLUTION>{expected_answer}</SOLUTION>",
    }
    assert own["solution_template"] == wanted[task] and len(THOUGHT) > 100
    rows = [json.loads(line) for line in (tmp_path / "runs" / f"{task}_sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert (
        len(losses) == 2 and losses[1] < losses[0] and all("eval/accuracy" in row for row in rows if "eval/loss" in row)
    )


def test_the_script_passes_exit_codes_on(tmp_path):
    """A first stage that is refused ends it; nothing of the second is started."""
    save_tiny(tmp_path / "model")
    file = tmp_path / "both.yaml"
    settings = {"model": str(tmp_path / "model"), "data": "none.jsonl", "rewards": {"mark_reward": 1.0}}
    settings |= {"output_dir": str(tmp_path / "out"), "sft": {"solution_column": "answer"}}
    file.write_text(yaml.safe_dump(settings))
    script = str(PROJECT / "launch" / "sft_then_grpo.sh")
    env = {**environment(), "GRPO_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, "1", "--config", str(file)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and "no such file 'none.jsonl'" in done.stderr
    assert done.stdout.count("stage:") == 1 and not (tmp_path / "out").exists()
