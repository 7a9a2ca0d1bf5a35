"""The scripts as a user runs them: train under torchrun and without, look at the results, ask them."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.support.launcher import fork_script, metrics_of, run_script
from tests.support.tiny import save_tiny

QUESTION = "Tom has 5 eggs. He buys 3, eats 2, finds 4 and sells 1. How many eggs does he have now?"
EVAL = ("--eval_rows", "16")


def folders(tmp_path):
    return ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The demo on two processes: 4 steps, saved at 2 and 4."""
    tmp_path = tmp_path_factory.mktemp("two")
    done = run_script("train.py", *folders(tmp_path), *EVAL, "--max_steps", "4", "--save_steps", "2", nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path, done


def step_lines(text):
    return [line for line in text.splitlines() if line.startswith("step: ")]


def test_console_says_what_it_does(two_ranks):
    tmp_path, done = two_ranks
    assert done.stdout.splitlines()[0].startswith("No --config, --model or --data given: running the demo")
    lines = step_lines(done.stdout)
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"], "one line a step, from rank 0 alone"
    for word in ("grpo_loss: ", "reward ", "length ", "grad ", "tok/s", "rollout "):
        assert word in lines[0]
    log = (tmp_path / "runs" / "demo" / "train.log").read_text()
    assert step_lines(log) == lines
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 0


def test_checkpoints_open_with_plain_transformers(two_ranks):
    output = two_ranks[0] / "output"
    assert sorted(p.name for p in output.glob("checkpoint_*")) == ["checkpoint_2", "checkpoint_4"]
    first, last = (AutoModelForCausalLM.from_pretrained(output / f"checkpoint_{n}") for n in (2, 4))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters())), "nothing was trained"


def test_one_process_trains_as_two_do(two_ranks, tmp_path):
    """Without torchrun, and with it on one rank: the same rewards, lengths and losses, step by step."""
    for nproc, start in ((None, run_script), (1, fork_script)):
        target = tmp_path / str(nproc)
        settings = (*folders(target), *EVAL, "--max_steps", "4", "--save_steps", "2", "--num_threads", "1")
        done = start("train.py", *settings, nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]
        ours, theirs = metrics_of(two_ranks[0] / "runs"), metrics_of(target / "runs")
        assert len(ours) == len(theirs) == 6
        for a, b in zip(ours, theirs):
            assert a["step"] == b["step"]
            keys = {"reward/mean", "completions/length_mean", "entropy", "grad_norm", "eval/accuracy", "lr"} & a.keys()
            assert keys and {key: a[key] for key in keys} == pytest.approx({key: b[key] for key in keys}, rel=1e-3)


def test_tensorboard_has_each_step_once(two_ranks):
    [events] = (two_ranks[0] / "runs").rglob("events.out.tfevents*")
    curves = EventAccumulator(str(events.parent)).Reload()
    tags = curves.Tags()
    wanted = {
        "loss",
        "reward/mean",
        "reward/std",
        "reward/final_answer_reward/mean",
        "reward/final_answer_reward/std",
        "reward/zero_std_groups",
        "completions/length_mean",
        "completions/truncated",
        "entropy",
        "kl_old",
        "clip/low",
        "clip/high",
        "grad_norm",
        "lr",
        "guards/skipped_updates",
        "guards/clamped_logits",
        "sampler_gap/max",
        "ratio_gap",
        "tokens_per_s",
        "time/rollout_s",
        "time/update_s",
        "time/step_s",
        "eval/accuracy",
    }
    assert wanted <= set(tags["scalars"])
    assert [event.step for event in curves.Scalars("reward/mean")] == [1, 2, 3, 4]
    texts = {
        name: curves.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in tags["tensors"] if "text" in name
    }
    assert any("final_answer_reward" in text for text in texts.values()), "the config is missing"
    assert any("**completion**" in text for text in texts.values()), "the samples are missing"


def test_sampler_and_trainer_agree(two_ranks):
    """The gap that decides whether sampler log-probs serve as old ones, on the real model."""
    for row in metrics_of(two_ranks[0] / "runs"):
        if "loss" in row:
            assert row["sampler_gap/max"] <= 1e-4 and row["ratio_gap"] <= 1e-4
            assert row["guards/trust_sampler"] == (row["step"] > 1)


def test_same_command_again_has_nothing_to_do(two_ranks):
    tmp_path, _ = two_ranks
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "output").rglob("*.safetensors"))
    done = fork_script("train.py", *folders(tmp_path), *EVAL, "--max_steps", "4", "--save_steps", "2")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "output").rglob("*.safetensors"))


def test_resuming_continues_the_run(two_ranks, tmp_path):
    """Interrupted after step 2 (its later checkpoint lost): steps 3 and 4 are those of the uninterrupted run."""
    settings = (*folders(tmp_path), *EVAL, "--max_steps", "4", "--save_steps", "2")
    assert fork_script("train.py", *settings, nproc=2).returncode == 0
    (tmp_path / "output" / "checkpoint_4" / "model.safetensors").write_bytes(b"torn")
    done = fork_script("train.py", *settings, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint_4 is not used: model.safetensors" in done.stderr and "resuming from" in done.stdout
    assert [line.split()[1] for line in step_lines(done.stdout)] == ["3/4", "4/4"]
    ours = [row for row in metrics_of(tmp_path / "runs") if "loss" in row]
    theirs = [row for row in metrics_of(two_ranks[0] / "runs") if "loss" in row]
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for a, b in zip(ours, theirs):
        same = {key for key in a if not key.startswith(("time/", "idle/")) and key != "tokens_per_s"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    done = fork_script("train.py", *settings, "--lr", "1e-5")
    assert done.returncode == 2 and "lr: 5e-05 there, 1e-05 now" in done.stderr


def test_inference_answers_one_question(two_ranks):
    output = str(two_ranks[0] / "output")
    answered = run_script("inference.py", "--output_dir", output, *QUESTION.split(" "))
    assert answered.returncode == 0
    assert answered.stdout.startswith(f"❓ 问题: {QUESTION}\n💡 回答: ") and "checkpoint_4" in answered.stderr
    flags = ("--model_dir", f"{output}/checkpoint_2", "--question", QUESTION, "--max_tokens", "8", "--json")
    answers = [fork_script("inference.py", *flags).stdout for _ in range(2)]
    assert answers[0] == answers[1] and json.loads(answers[0])["question"] == QUESTION
    streamed = fork_script("inference.py", "--output_dir", output, "--stream", QUESTION)
    assert streamed.stdout == answered.stdout


def test_inference_runs_the_built_in_cases(two_ranks):
    done = fork_script("inference.py", "--output_dir", str(two_ranks[0] / "output"))
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("[测试")] == [
        f"[测试 {i}/4]" for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        (("--output_dir", "no_such_folder", "hello"), "none in no_such_folder"),
        (("--checkpoint", "demo", "hello"), "no model in demo"),
        (("--checkpoint", "demo/base", "hello"), "MANIFEST.json is missing"),
        (("--temperature", "-1", "hello"), "temperature: must be"),
        (("--max_new_tokens", "0", "hello"), "max_new_tokens: must be"),
    ],
)
def test_inference_says_what_is_wrong(args, message):
    done = fork_script("inference.py", *args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_gsm8k_format_trains_a_small_random_model(tmp_path):
    """configs/gsm8k.yaml on local JSONL: golds behind ####, long prompts dropped with a count, tags rewarded."""
    save_tiny(tmp_path / "model", spread=1.0)
    rows = [{"question": "word " * n, "answer": f"because\n#### {n}"} for n in (2, 3, 4, 400)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = fork_script(
        "train.py",
        "--config",
        "configs/gsm8k.yaml",
        *folders(tmp_path),
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--eval_data",
        "null",
        "--max_steps",
        "2",
        "--dtype",
        "fp32",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--max_generate_length",
        "16",
        "--max_prompt_length",
        "230",
        "--system_prompt",
        "Think, then answer.",
        "--eval_split_size",
        "0",
        "--num_generations",
        "4",
        nproc=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 questions kept, 1 dropped as too long" in done.stdout
    assert "  kl " in step_lines(done.stdout)[0]
    rows = metrics_of(tmp_path / "runs")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and "reward/tag_count_reward/mean" in rows[0]
    state = json.loads((tmp_path / "output" / "checkpoint_2" / "trainer" / "state.json").read_text())
    assert state["config"]["model"] == str(tmp_path / "model")
    assert Path(tmp_path / "output" / "checkpoint_2" / "MANIFEST.json").is_file()
