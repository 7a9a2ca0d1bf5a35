"""Evaluation: statistics against their definitions, extraction by cases, the command against known answers.

The model is a tiny one that was taught its answers, so every figure of a report is known in advance.
"""

import itertools
import json
import math
import os
import shutil
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.best import BestCheckpoint, best_name
from grpo.checkpoints.manifest import write_manifest
from grpo.config.settings import Config
from grpo.evaluate import command, extract, statistics
from tests.support.launcher import fork_script
from tests.support.taught import taught_checkpoint


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before():
    """The command sets the number of threads, and here it runs in this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- statistics


@pytest.mark.parametrize("correct, total", [(0, 10), (1, 3), (8, 10), (88, 100), (100, 100)])
def test_wilson_is_where_the_score_test_turns(correct, total):
    """Its bounds are the shares p at which |observed - p| is z standard errors of p, which this checks directly."""
    low, high = statistics.wilson(correct, total)
    for bound, edge in ((low, correct == 0), (high, correct == total)):
        error = math.sqrt(bound * (1 - bound) / total)
        assert edge or abs(correct / total - bound) == pytest.approx(statistics.Z95 * error, rel=1e-9)
    assert low <= correct / total <= high and statistics.wilson(0, 0) == (0.0, 1.0)


def test_wilson_has_its_published_value():
    """Newcombe (1998), table I: 81 of 263."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("a, b", [(0, 0), (0, 5), (1, 8), (3, 3), (12, 5), (700, 800)])
def test_mcnemar_is_the_binomial_tail(a, b):
    tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2 ** (a + b)))
    assert statistics.mcnemar(a, b) == pytest.approx(float(exact), rel=1e-12)
    assert statistics.mcnemar(a, b) == statistics.mcnemar(b, a)


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n, c):
    right = [i < c for i in range(n)]
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert statistics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


# --- extraction


@pytest.mark.parametrize(
    "text, marks, strict, lenient",
    [
        ("<think>3</think><answer>\n27\n</answer>", "answer", "27", "27"),
        ("<answer>27 apples</answer>", "answer", None, "27"),
        ("<answer>1</answer>, no: <answer>2</answer>", "answer", "2", "2"),
        ("so 27", "answer", None, "27"),
        ("<answer>1,450</answer> I had 3 tries", "answer", "1,450", "3"),
        ("<answer>−8</answer>", "answer", "−8", "-8"),
        ("<answer>27", "answer", None, "27"),
        ("</answer>27<answer>", "answer", None, "27"),
        ("<SOLUTION>7</SOLUTION><answer>9</answer>", "SOLUTION", "7", "9"),
        ("5 + 5\n#### 10", "hash", "10", "10"),
        ("no number", "hash", None, None),
        ("<answer>nan</answer>", "answer", None, None),
        ("<answer>" + "9" * 10**5 + "</answer>", "answer", None, "9" * 10**5),
    ],
)
def test_numbers_are_found(text, marks, strict, lenient):
    assert extract.strict(text, "number", marks) == strict
    assert extract.lenient(text, "number", marks) == lenient


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("<answer>b</answer>", "B", "B"),
        ("A or B? <answer>(C).</answer>", "C", "C"),
        ("<answer>?</answer>", "?", "?"),
        ("<answer> ？ </answer> rather than A", "?", "?"),
        ("<answer>A and B</answer>", None, "B"),
        ("It is D", None, "D"),
        ("a bad cad", None, "A"),
        ("Nothing here", None, None),
        ("", None, None),
    ],
)
def test_choices_are_found(text, strict, lenient):
    assert extract.strict(text, "choice", "answer") == strict
    assert extract.lenient(text, "choice", "answer") == lenient


@pytest.mark.parametrize(
    "pred, gold, same",
    [
        ("73.0", "73", True),
        ("$1,450.", "1450", True),
        ("７２", "72", True),
        ("1/2", "0.5", True),
        ("-8", "8", False),
        ("0.1", "1/10", True),
        ("1,45", "145", False),
        ("3/0", "3", False),
        (None, "3", False),
        ("+5", "5", True),
        ("--5", "5", False),
        ("", "", False),
        ("9" * 300, "9" * 300, False),
    ],
)
def test_numbers_are_compared_as_numbers(pred, gold, same):
    assert extract.is_correct(pred, gold, "number") is same


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(alphabet="<answer>/SOLUTION#0123456789,.-$ABCD?？½ \n\ud800x", max_size=80))
def test_no_text_breaks_extraction(text):
    for task in ("number", "choice", "text"):
        for marks in ("answer", "SOLUTION", "hash"):
            for read in (extract.strict, extract.lenient):
                pred = read(text, task, marks)
                extract.is_correct(pred, text, task)
                assert pred is None or task != "choice" or pred in ("A", "B", "C", "D", "?")


# --- the command

GOLDS = (27, 8, 1450, 5, 3, 0)
ANSWERS = ("think\n#### 27", "#### 9", "#### 1,450.0", "it is 5", "#### 3 pears", "#### 0")  # strict: T F T F F T


def lessons(texts):
    return [(f"How many are {'ab'[i % 2] * (i + 1)}?", {}, text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A checkpoint that answers ANSWERS, one that answers all golds, and the questions as a file."""
    folder = tmp_path_factory.mktemp("numbers")
    sizes = ("--max_generate_length", "24", "--max_prompt_length", "64", "--answer_format", "hash")
    taught_checkpoint(folder / "checkpoint_1", lessons(ANSWERS), sizes)
    taught_checkpoint(folder / "checkpoint_2", lessons([f"#### {gold}" for gold in GOLDS]), sizes)
    rows = [{"question": q, "answer": f"so\n#### {gold}"} for (q, _, _), gold in zip(lessons(ANSWERS), GOLDS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(folder, *args, checkpoint="checkpoint_1"):
    return command.main(
        ["--checkpoint", str(folder / checkpoint), "--data", str(folder / "data.jsonl"), "--num_threads", "1", *args]
    )


def test_lines_and_figures(numbers, capfd, tmp_path):
    assert evaluate(numbers, "--out", str(tmp_path / "r.jsonl")) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == [
        "[1/6] ✅=1 | Acc=100.00% | Pred: 27 | GT: 27",
        "[2/6] ✅=1 | Acc=50.00% | Pred: 9 | GT: 8",
        "[3/6] ✅=2 | Acc=66.67% | Pred: 1,450.0 | GT: 1450",
    ]
    assert lines[3] == "[4/6] ✅=2 | Acc=50.00% | Pred: none | GT: 5"
    low, high = statistics.wilson(3, 6)
    assert lines[6:] == [
        "Final accuracy: 50.00% (3/6)",
        f"strict extraction: 50.00% (3/6), 95% interval {low:.2%} to {high:.2%}",
        "lenient extraction: 83.33% (5/6), 95% interval 43.65% to 96.99%",
    ]
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert all(list(row) == ["q", "gold", "pred", "full", "correct"] for row in rows)
    assert [row["full"] for row in rows] == list(ANSWERS)
    assert [row["correct"] for row in rows] == [True, False, True, False, False, True]
    assert evaluate(numbers, "--limit", "2") == 0
    assert "Final accuracy: 50.00% (1/2)" in capfd.readouterr().out


def test_two_ranks_give_the_same_bytes(numbers, tmp_path, capfd):
    """Six rows in chunks of one, on two processes."""
    assert evaluate(numbers, "--out", str(tmp_path / "one.jsonl"), "--batch_rows", "1") == 0
    alone = capfd.readouterr().out
    args = [
        "--checkpoint",
        str(numbers / "checkpoint_1"),
        "--data",
        str(numbers / "data.jsonl"),
        "--batch_rows",
        "1",
        "--num_threads",
        "1",
        "--out",
        str(tmp_path / "two.jsonl"),
    ]
    done = fork_script("grpo.evaluate", *args, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == alone
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_what_is_decoded_together_does_not_matter(numbers, tmp_path):
    for rows in (1, 4, 32):
        assert evaluate(numbers, "--out", str(tmp_path / f"{rows}.jsonl"), "--batch_rows", str(rows)) == 0
    assert len({(tmp_path / f"{rows}.jsonl").read_bytes() for rows in (1, 4, 32)}) == 1


def test_sampling_reports_pass_and_majority(numbers, capfd, tmp_path):
    """At a temperature near 0 all completions of a question are equal, so every figure is the greedy accuracy."""
    out = tmp_path / "r.jsonl"
    assert evaluate(numbers, "--samples", "3", "--temperature", "1e-3", "--out", str(out)) == 0
    figures = [f"{name}: 50.00% ± 22.36%" for name in ("pass@1", "pass@2", "pass@3", "maj@3")]  # sqrt(0.25 / 5)
    assert capfd.readouterr().out.splitlines()[-1] == "; ".join(figures)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 6
    assert [row["full"] for row in rows[::3]] == list(ANSWERS)


def test_two_checkpoints_are_compared(numbers, capfd, tmp_path):
    one, two = (str(numbers / f"checkpoint_{n}") for n in (1, 2))
    data = ("--data", str(numbers / "data.jsonl"), "--num_threads", "1")
    assert command.main(["--compare", one, two, *data]) == 0
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert lines[0].endswith("50.00% (3/6)") and lines[1].endswith("100.00% (6/6)")
    assert lines[2] == "paired on 6 questions: both right 3, only A 0, only B 3, neither 0"
    assert lines[3].startswith("B - A: +50.00 points") and lines[3].endswith("p = 0.25")
    for n in (1, 2):  # the same from files
        assert evaluate(numbers, "--out", str(tmp_path / f"{n}.jsonl"), checkpoint=f"checkpoint_{n}") == 0
    capfd.readouterr()
    assert command.main(["--compare", str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")]) == 0
    assert capfd.readouterr().out.splitlines()[2:] == lines[2:]
    results = (tmp_path / "2.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "2.jsonl").write_text("".join(results[:-1]))
    assert command.main(["--compare", str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")]) == 2
    assert "did not answer the same questions (6 and 5)" in capfd.readouterr().err


def test_a_checkpoint_is_compared_with_what_it_was_trained_from(numbers, capfd, tmp_path):
    two = str(numbers / "checkpoint_2")
    assert evaluate(numbers, "--base", two, "--out", str(tmp_path / "r.jsonl")) == 0
    done = capfd.readouterr()
    assert f"with the weights of {two}" in done.err
    assert done.out.splitlines()[-2] == "paired on 6 questions: both right 3, only A 3, only B 0, neither 0"
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["full"] for row in rows] == list(ANSWERS)  # the checkpoint's own
    assert command.main(["--compare", two, two, "--base", two]) == 2
    assert "base, compare: choose one" in capfd.readouterr().err


def test_without_marks_the_last_number_is_the_answer(numbers, capfd):
    assert evaluate(numbers, "--marks", "none") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[6] == "Final accuracy: 83.33% (5/6)" and lines[3].endswith("Pred: 5 | GT: 5")
    assert lines[7].split(":")[1] == lines[8].split(":")[1]
    assert extract.split_reasoning("<think>a</think> It is 4.", "none") == ("a", "It is 4.")


@pytest.mark.parametrize(
    "args, error",
    [
        (("--limit", "-1"), "limit: must be >= 0, got -1"),
        (("--samples", "2", "--temperature", "0"), "greedy completions are all the same"),
        (("--best",), "checkpoint, best, compare: choose one"),
        (("--compare", "nope", "nope"), "choose one"),
        (("--answer_column", "nope"), "nope"),
        (("--refusal", "a"), "refusal: must be a text other than A to D"),
        (("--out", "no/such/folder/r.jsonl"), "out: no/such/folder/r.jsonl cannot be written"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(numbers, capfd, args, error):
    assert evaluate(numbers, *args) == 2
    err = capfd.readouterr().err
    assert error in err and "Traceback" not in err and err.count("error: ") == 1


def test_without_gold_answers_there_is_no_accuracy(numbers, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text("")
    for data, error in ((tmp_path / "empty.jsonl", "empty"), (tmp_path / "nope.jsonl", "no such file")):
        assert command.main(["--checkpoint", str(numbers / "checkpoint_1"), "--data", str(data)]) == 2
        err = capfd.readouterr().err
        assert error in err and "Traceback" not in err


# --- the best checkpoint


def saved(folder, step, **config):
    (folder / f"checkpoint_{step}" / "trainer").mkdir(parents=True)
    state = {"config": {"eval_data": None, "eval_split": "test", "eval_rows": 0} | config}
    (folder / f"checkpoint_{step}" / "trainer" / "state.json").write_text(json.dumps(state))


def test_the_pointer_follows_improvements_only(tmp_path):
    cfg = Config(output_dir=str(tmp_path))
    best = BestCheckpoint(cfg, 0)
    assert [best.consider(step, value) for step, value in ((10, 0.5), (20, 0.4), (30, 0.5), (40, 0.7))] == [
        True,
        False,
        False,
        True,
    ]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "checkpoint_40",
        "step": 40,
        "metric": "eval/accuracy",
        "value": 0.7,
    }
    assert os.listdir(tmp_path) == ["best.json"]
    saved(tmp_path, 40)
    assert not BestCheckpoint(cfg, 40).consider(50, 0.6), "a resumed run knows what was best"
    assert best_name(tmp_path) == "checkpoint_40"


@pytest.mark.parametrize("why", ["steps that are lost", "another run", "other questions", "no sense"])
def test_a_pointer_that_does_not_belong_is_dropped(tmp_path, why):
    BestCheckpoint(Config(output_dir=str(tmp_path)), 0).consider(40, 0.7)
    if why != "another run":
        saved(tmp_path, 40, **({"eval_rows": 16} if why == "other questions" else {}))
    if why == "no sense":
        (tmp_path / "best.json").write_text('{"checkpoint": "../elsewhere", "step": 40, "metric": "x", "value": 1}')
    best = BestCheckpoint(Config(output_dir=str(tmp_path)), 20 if why == "steps that are lost" else 40)
    assert best_name(tmp_path) is None and best.consider(50, 0.1)


def test_pruning_spares_the_best(numbers, tmp_path):
    """save_total_limit 1 keeps the newest checkpoint, and the one that did best."""
    for step in (1, 2, 3):
        shutil.copytree(numbers / "checkpoint_1", tmp_path / f"checkpoint_{step}")
        write_manifest(tmp_path / f"checkpoint_{step}", step)
    BestCheckpoint(Config(output_dir=str(tmp_path)), 0).consider(1, 0.7)
    checkpoint._prune(tmp_path, 1, tmp_path / "checkpoint_3")
    assert sorted(os.listdir(tmp_path)) == ["best.json", "checkpoint_1", "checkpoint_3"]
