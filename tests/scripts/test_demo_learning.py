"""The demo: its task, its base, and that GRPO teaches it what shuffled rewards do not."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest

from grpo.models.loading import load_tokenizer
from tests.support.launcher import PROJECT, fork_script, metrics_of

DEMO = PROJECT / "demo"
SHUFFLED = json.dumps({"benchmarks/shuffled_reward.py:shuffled_final_answer_reward": 1.0})
SIGNS = {
    **dict.fromkeys(("buys", "finds", "gets", "wins", "picks", "earns"), 1),
    **dict.fromkeys(("eats", "sells", "loses", "drops", "gives", "uses"), -1),
}


def rows_of(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def make_task():
    spec = importlib.util.spec_from_file_location("make_task", DEMO / "make_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hash_puts_every_question_on_its_side(make_task):
    train, test = ({row["question"] for row in rows_of(name)} for name in ("train.jsonl", "test.jsonl"))
    assert len(train) == 2000 and len(test) == 256
    assert not train & test
    assert not any(map(make_task.is_held_out, train))
    assert all(map(make_task.is_held_out, test))


def changes_of(question):
    """The numbers of a question and what is done with them; who has what is left out."""
    return re.search(r"has (\d+)", question)[1], *re.findall(r"(\w+) (\d+)[,. ]", question)[1:]


def test_no_held_out_question_was_taught_under_another_name(make_task):
    # make_base.py draws its 1200 * 48 teaching rows and 3000 for the tokenizer from these two streams; a sixteenth
    # of each would be held out if nothing kept them apart
    held_out = {changes_of(row["question"]) for row in rows_of("test.jsonl")}
    assert not held_out & {changes_of(row["question"]) for row in rows_of("train.jsonl")}
    for seed, count in ((1000, 1200 * 48), (500, 3000)):
        taught = [row["question"] for row in itertools.islice(make_task.problems(seed, held_out=False), count)]
        assert not any(map(make_task.is_held_out, taught))
        assert not held_out & set(map(changes_of, taught))


def test_the_gold_answers_are_right():
    for row in [*rows_of("train.jsonl"), *rows_of("test.jsonl")]:
        start = int(re.search(r"has (\d+)", row["question"])[1])
        changes = [
            SIGNS[verb] * int(amount)
            for verb, amount in re.findall(r"(\w+) (\d+)[,. ]", row["question"])
            if verb in SIGNS
        ]
        assert len(changes) >= 4
        assert row["answer"].endswith(f"\n#### {start + sum(changes)}")


def test_make_task_writes_the_same_files_again(tmp_path):
    shutil.copy(DEMO / "make_task.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_task.py"], check=True, capture_output=True)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_the_base_is_small():
    assert sum(path.stat().st_size for path in (DEMO / "base").rglob("*")) <= 8_000_000


@pytest.mark.parametrize(
    "text", ["小明有10个苹果，吃了3个，还剩几个？", "👩‍👩‍👧 🚀 ½ é ü", "a\r\nb\n\n  c\t d \r", " x<y>z "]
)
def test_the_tokenizer_gives_any_text_back(text):
    tokenizer = load_tokenizer("demo/base")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def train(folder, *settings):
    """Run the demo on two ranks; return the held-out metrics before and after, and those of the steps."""
    done = fork_script(
        "train.py",
        "--output_dir",
        str(folder / "output"),
        "--runs_dir",
        str(folder / "runs"),
        *settings,
        nproc=2,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = metrics_of(folder / "runs")
    before, after = (row for row in metrics if "eval/accuracy" in row)
    return before, after, [row for row in metrics if "reward/mean" in row]


def test_forty_steps_of_the_demo_teach_it(tmp_path):
    # Chance cannot pass: with shuffled rewards six seeds moved between -3.9 and +0.8 points in 60 steps
    # (benchmarks/RESULTS.md), and the same rewards as here gain 90.
    before, after, steps = train(tmp_path, "--max_steps", "40", "--seed", "1")
    assert before["eval/accuracy"] <= 0.5
    assert after["eval/accuracy"] >= before["eval/accuracy"] + 0.5
    assert after["eval/length_mean"] >= 3 * before["eval/length_mean"]
    first, last = ([step["reward/mean"] for step in part] for part in (steps[:10], steps[-10:]))
    assert sum(last) / 10 >= sum(first) / 10 + 0.2


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_keeps_its_promise(tmp_path, seed):
    before, after, _ = train(tmp_path, "--seed", str(seed))
    assert before["eval/accuracy"] <= 0.5
    assert after["eval/accuracy"] >= 0.9


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shuffled_rewards_teach_nothing(tmp_path, seed):
    before, after, _ = train(tmp_path, "--seed", str(seed), "--rewards", SHUFFLED)
    assert after["eval/accuracy"] <= before["eval/accuracy"] + 0.05
