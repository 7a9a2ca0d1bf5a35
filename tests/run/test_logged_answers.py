"""Answers to held-out questions are logged, by the rank that gave them."""

import json

from tests.support.launcher import fork_script, metrics_of

SETTINGS = ("--max_steps", "2", "--eval_rows", "24", "--eval_steps", "1", "--save_steps", "1", "--num_threads", "1")


def test_every_evaluation_has_the_answers_that_its_accuracy_counts(tmp_path):
    """Lines of both ranks together: each question once an evaluation, and the mean of their rewards is the accuracy.
    A resumed run does not write those of its first step again."""
    folders = ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"))
    for steps in ("2", "3"):
        more = ("--lr_schedule", "constant", "--max_steps", steps)
        done = fork_script("train.py", *SETTINGS, *folders, *more, nproc=2)
        assert done.returncode == 0, done.stderr[-3000:]
    answers = [
        json.loads(line)
        for rank in (0, 1)
        for line in (tmp_path / f"runs/demo/held_out-rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    accuracy = {one["step"]: one["eval/accuracy"] for one in metrics_of(tmp_path / "runs") if "eval/accuracy" in one}
    assert sorted(accuracy) == [0, 1, 2, 3]
    for step, share in accuracy.items():
        own = [one for one in answers if one["step"] == step]
        assert sorted(one["row"] for one in own) == list(range(24)) and len({one["question"] for one in own}) == 24
        assert sum(one["reward"] for one in own) / 24 == share
        assert all(one["advantage"] is None and one["set"] == "" and one["length"] > 0 for one in own)
