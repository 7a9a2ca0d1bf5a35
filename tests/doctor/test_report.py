"""The command on runs of any state: what it prints, refuses and survives."""

import json
import os
import subprocess
import sys
import time

import pytest

from grpo.doctor import report
from grpo.doctor.command import main
from grpo.doctor.findings import diagnose
from grpo.doctor.recording import METRICS_LIMIT, read_run
from grpo.doctor.report import short_form
from grpo.doctor.rules import RULES
from tests.doctor.record import unpack
from tests.support.launcher import PROJECT, fork_script

HOSTILE = "\x1b[2J\x1b]0;title\x07[bold]x[/bold]\u202egnp.exe\ud800\r\n<script>"


@pytest.fixture
def boxed(tmp_path):
    """A run whose reward reads a box that no completion has."""
    return unpack("boxed", tmp_path / "boxed")


def rules_of(folder):
    return {finding.rule for finding in diagnose(read_run(folder), RULES)}


def test_the_report_names_evidence_example_reason_and_setting(boxed, capsys):
    assert main([str(boxed)]) == 0
    out = capsys.readouterr().out
    assert "1. A reward was never given (never_given)" in out
    assert "boxed was 0 for every completion of 12 steps" in out
    assert "it contains the gold answer" in out and "the reward looks elsewhere" in " ".join(out.split())
    assert "system_prompt, prompt_template" in " ".join(out.split())


def test_the_language_is_that_of_the_run_or_the_one_asked_for(boxed, capsys):
    settings = json.loads((boxed / "run.json").read_text())
    settings["settings"]["console_language"] = "zh-Hant"
    (boxed / "run.json").write_text(json.dumps(settings))
    main([str(boxed)])
    assert "有一个奖励从未给出" in capsys.readouterr().out
    main([str(boxed), "--language", "en"])
    assert "A reward was never given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "has no metrics.jsonl"),
        (
            lambda folder: (folder / "inner").mkdir(parents=True) or (folder / "inner" / "metrics.jsonl").touch(),
            "inner",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, word, capsys):
    make(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and word in captured.err and captured.err.count("\n") == 1


def test_the_command_needs_neither_torch_nor_transformers():
    code = "import sys, grpo.doctor.command; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_an_old_run_is_read_from_the_text_of_tensorboard(boxed):
    """Its settings stand there as they did before run.json; without them limits come from the metrics."""
    settings = json.loads((boxed / "run.json").read_text())["settings"]
    (boxed / "run.json").unlink()
    assert read_run(boxed).config == {} and "never_given" in rules_of(boxed)
    text = b"\x0a\x10junk```json\n" + json.dumps(settings, indent=2).encode() + b"\n```\x00more"
    (boxed / "events.out.tfevents.1").write_bytes(text)
    assert read_run(boxed).config["num_generations"] == 4


def test_a_run_that_is_being_written_is_read_without_its_last_line(boxed):
    for name in ("metrics.jsonl", "rollouts-rank0.jsonl"):
        text = (boxed / name).read_text()
        (boxed / name).write_text(text + text.splitlines()[-1][:40])
    assert read_run(boxed).unreadable == 0 and "never_given" in rules_of(boxed)


def test_damaged_lines_are_counted_and_left_out(boxed, capsys):
    bad = [
        '{"step": NaN',
        "[1]",
        "null",
        '{"step": "x"}',
        '{"step": -1}',
        '{"a": ' + "[" * 5000,
        '{"step": 1' + "0" * 400 + "}",
    ]
    with (boxed / "metrics.jsonl").open("a") as file:
        file.write("\n".join(bad) + "\n")
    with (boxed / "rollouts-rank0.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 1, "row": 0}\n{"step": true, "row": 0, "question": "", "completion": ""}\n')
    (boxed / "run.json").write_text('{"settings": {"num_generations": "x", "rewards": [], "max_grad_norm": null}}')
    (boxed / "exit.json").write_text("[")
    assert main([str(boxed)]) == 0
    assert "10 lines could not be read" in capsys.readouterr().out and "never_given" in rules_of(boxed)


def test_hostile_text_reaches_no_terminal(boxed, capsys):
    """Names, questions, answers, settings and reasons: no control character, no mark of direction, short lines."""
    rows = [json.loads(line) for line in (boxed / "rollouts-rank0.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {
            "question": HOSTILE + row["question"],
            "completion": HOSTILE + "x" * 10**6,
            "gold": HOSTILE,
            "extracted": HOSTILE * 9,
        }
    (boxed / "rollouts-rank0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    (boxed / "exit.json").write_text(json.dumps({"code": 76, "reason": HOSTILE}))
    metrics = (
        (boxed / "metrics.jsonl").read_text().replace("reward/boxed/", "reward/" + json.dumps(HOSTILE)[1:-1] + "/")
    )
    (boxed / "metrics.jsonl").write_text(metrics)
    assert main([str(boxed)]) == 0
    out = capsys.readouterr().out
    assert "never_given" in out and "stopped" in out
    assert out.replace("\n", "").isprintable() and max(map(len, out.splitlines())) < 130


def test_the_short_form_is_one_line_or_nothing(boxed, tmp_path):
    line = short_form(boxed, "en")
    assert line is not None and line.startswith("doctor: A reward was never given") and str(boxed) in line
    assert short_form(unpack("demo", tmp_path / "demo"), "en") is None
    assert short_form(tmp_path / "nothing", "en") is None


def test_a_run_that_ends_says_it(tmp_path):
    """Ten steps of a reward that is never given; the demo's own reward says nothing (tests/scripts)."""
    places = ["--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), "--report_to", "none"]
    few = [
        "--max_steps",
        "10",
        "--batch_size",
        "2",
        "--max_generate_length",
        "12",
        "--eval_data",
        "null",
        "--device",
        "cpu",
    ]
    rewards = ["--rewards", '{"tests/doctor/bad_rewards.py:boxed": 1.0}']
    done = fork_script("train.py", "--config", "configs/demo.yaml", *places, *few, *rewards)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("doctor: ")]
    assert "A reward was never given" in line and f"python -m grpo.doctor {tmp_path / 'runs' / 'demo'}" in line
    assert done.stdout.splitlines()[-1].startswith("done: ")


def test_a_rule_that_fails_does_not_fail_the_run(boxed, monkeypatch):
    def broken(run):
        raise ZeroDivisionError

    monkeypatch.setitem(report.RULES, "too_hard", broken)
    assert short_form(boxed, "en") is None


def test_a_large_run_costs_little(boxed):
    """The short form reads the ends of a file of 40 MB, which would take seconds whole."""
    line = (boxed / "rollouts-rank0.jsonl").read_text().splitlines()[-1] + "\n"
    with (boxed / "rollouts-rank0.jsonl").open("a") as file:
        file.write(line * (40 * 2**20 // len(line)))
    began = time.process_time()
    assert short_form(boxed, "en") is not None
    assert time.process_time() - began < 1.0
    assert METRICS_LIMIT < 2**30


def test_the_end_is_looked_for_in_output_dir_unless_it_is_of_another_run(boxed, tmp_path):
    settings = json.loads((boxed / "run.json").read_text())
    settings["settings"]["output_dir"] = str(tmp_path / "output")
    (boxed / "run.json").write_text(json.dumps(settings))
    (boxed / "exit.json").unlink(missing_ok=True)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "exit.json").write_text('{"code": 74, "reason": "STALL rank=1"}')
    assert read_run(boxed).ended == (74, "STALL rank=1")
    earlier = time.time() - 9000
    os.utime(tmp_path / "output" / "exit.json", (earlier, earlier))
    assert read_run(boxed).ended is None
