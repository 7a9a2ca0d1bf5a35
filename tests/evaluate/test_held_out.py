"""Held-out questions during training: several sets, several sampled answers, the same figures on any ranks."""

import dataclasses
import itertools
import json
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml

from grpo.checkpoints.best import BestCheckpoint
from grpo.config.checks import check
from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from grpo.evaluate.held_out import evaluate, evaluate_sets
from grpo.evaluate.statistics import mean_with_error, of_several_answers
from grpo.rewards.loading import make_rewards
from grpo.rewards.pool import InProcess
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import sampling_of
from grpo.run.task import Task, held_out_notices, load_task
from grpo.runtime.distributed import World
from grpo.types import Completion, Prompt
from tests.support.launcher import fork_script, metrics_of
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))

# --- closed forms


@pytest.mark.parametrize("num_each", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer(num_each):
    rng = random.Random(num_each)
    right = [[rng.random() < 0.3 for _ in range(num_each)] for _ in range(7)]
    found = of_several_answers(right, None)
    ks = [k for k in (1, 2, 4, 8) if k <= num_each] + ([5] if num_each == 5 else [])
    assert list(found) == [f"pass@{k}" for k in ks]
    for k in ks:
        shares = []
        for answers in right:
            subsets = list(itertools.combinations(answers, k))
            shares.append(Fraction(sum(map(any, subsets)), len(subsets)))
        mean = sum(shares) / 7
        error = math.sqrt(sum((share - mean) ** 2 for share in shares) / 6 / 7)
        assert found[f"pass@{k}"] == pytest.approx((float(mean), error))


@pytest.mark.parametrize(
    "answers, votes, is_right",
    [
        ([True, False, False], ["4", "5", "5"], 0.0),
        ([True, False, True], ["4", "5", "4"], 1.0),
        ([True, False], ["4", "5"], 1.0),  # a tie: the first one sampled
        ([False, True], ["5", "4"], 0.0),
        ([False, True, True], ["5", "4", "4"], 1.0),
        ([True, True, True], [None, None, "4"], 1.0),  # what is not read has no vote
        ([True, True], [None, None], 0.0),
        ([True, False, True], ["4", "4", "4"], 1.0),  # judged by the first of equal answers
    ],
)
def test_the_majority(answers, votes, is_right):
    found = of_several_answers([answers, answers], [votes, votes])
    assert found[f"maj@{len(answers)}"] == (is_right, 0.0)


def test_one_question_has_no_standard_error():
    mean, error = mean_with_error([0.25])
    assert mean == 0.25 and math.isnan(error)


# --- the evaluation


def early_letter_reward(completions, **columns):
    """Right where the marked answer begins with a letter from a to m."""
    return [float(text.partition("<answer>")[2][:1] in [*"abcdefghijklm"]) for text in completions]


class Scripted:
    """An engine whose answers are given by question and number: each a text."""

    chunk_rows = None

    def __init__(self, texts):
        self.texts, self.requests, self.sampling = texts, [], None

    def generate(self, requests, sampling, pulse, on_finished=None):
        self.sampling = sampling
        self.requests += requests
        tokenizer = tiny_tokenizer()
        rows = [(r, self.texts[r.prompt_ids[0]][r.generation]) for r in requests]
        return [completion_of(r.row, tokenizer(text, add_special_tokens=False)["input_ids"]) for r, text in rows]


def completion_of(row, ids):
    return Completion(row, np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop")


def boxed(*answers):
    return [f"so <answer>{answer}</answer>" if answer else "none" for answer in answers]


QUESTIONS = Questions([Prompt(p, "", (p, *range(p)), {"question": "?"}) for p in range(3)], 0)
TEXTS = {0: boxed("a", "z", "z", "a"), 1: boxed("y", "y", "b", None), 2: boxed("c", "c ", "x", None)}
ASKS = Config(prompt_template="{question} <answer></answer>", eval_generations=4, rollout_chunk_rows=4, temperature=0.7)


def measured(cfg, texts=TEXTS, function=early_letter_reward):
    engine = Scripted(texts)
    rewards = InProcess.of({"mine.py:right": function})
    return engine, evaluate(engine, QUESTIONS, rewards, tiny_tokenizer(), cfg, ALONE, print)


def test_means_passes_and_majorities_of_scripted_answers():
    """Right: a, a, of question 0; b of 1; c, c of 2. Prompts are sorted by length, votes are not."""
    engine, metrics = measured(ASKS)
    assert engine.sampling == sampling_of(ASKS) and engine.sampling.temperature == 0.7
    rights = (2, 1, 2)
    assert metrics["eval/accuracy"] == metrics["eval/pass@1"] == metrics["eval/right"] == pytest.approx(5 / 12)
    assert metrics["eval/pass@2"] == pytest.approx(sum(1 - math.comb(4 - c, 2) / 6 for c in rights) / 3)
    assert metrics["eval/pass@4"] == 1.0
    assert metrics["eval/maj@4"] == pytest.approx(2 / 3)  # a before z; y; c and "c " are one answer
    shares = [c / 4 for c in rights]
    mean = sum(shares) / 3
    assert metrics["eval/accuracy_se"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in shares) / 2 / 3))


def test_the_random_numbers_belong_to_question_and_answer():
    """Neither the chunks nor the other questions change them, and no step of training has the same ones."""
    places = []
    for rows in (4, 100):
        engine, _ = measured(Config(**{**vars(ASKS), "rollout_chunk_rows": rows}))
        places.append(sorted((r.prompt_ids[0], r.generation, r.slot) for r in engine.requests))
    assert places[0] == places[1] == [(p, g, 2**62 + p) for p in range(3) for g in range(4)]


def test_tasks_without_marks_and_graded_rewards_have_no_majority():
    _, metrics = measured(Config(**{**vars(ASKS), "prompt_template": "{question}"}))
    assert "eval/pass@4" in metrics and "eval/maj@4" not in metrics
    _, metrics = measured(ASKS, function=lambda completions, **columns: [0.5])
    assert metrics.keys() == {"eval/length_mean", "eval/right"} and metrics["eval/right"] == 0.5


def test_numbers_written_differently_are_one_vote():
    texts = {p: boxed("7", "4.0", "4", "1,000") for p in range(3)}
    four = lambda completions, **columns: [float("4" in text) for text in completions]  # noqa: E731
    _, metrics = measured(ASKS, texts, four)
    assert metrics["eval/maj@4"] == 1.0


def test_without_the_setting_there_is_one_greedy_answer():
    texts = {p: boxed("a") for p in range(3)}
    engine, metrics = measured(Config(**{**vars(ASKS), "eval_generations": 0}), texts)
    assert engine.sampling.temperature == 0 and Counter(r.generation for r in engine.requests) == {0: 3}
    assert metrics == {"eval/length_mean": metrics["eval/length_mean"], "eval/accuracy": 1.0, "eval/right": 1.0}


def test_a_set_does_not_change_the_figures_of_another():
    tokenizer, cfg = tiny_tokenizer(), Config(**{**vars(ASKS), "max_generate_length": 12})
    rewards = InProcess.of({"mine.py:right": lambda completions, **columns: [float(len(completions[0]) % 3)]})
    rows = [Prompt(p, "", tuple(range(5, 8 + p)), {"question": "?"}) for p in range(4)]
    engine = NativeEngine(tiny_model("qwen3", len(tokenizer), spread=1.5), [0], 12, 1)
    sets = {"few": Questions(rows[:2], 0), "all": Questions(rows, 0)}

    def of(held_out):
        task = Task(tokenizer, Recipe(), held_out["all"], held_out)
        return evaluate_sets(engine, task, rewards, cfg, ALONE, print)

    both, alone, turned = of(sets), of({"all": sets["all"]}), of(dict(reversed(sets.items())))
    assert both == turned and {key: both[key] for key in alone} == alone
    single = evaluate(engine, sets["all"], rewards, tokenizer, cfg, ALONE, print)
    assert single["eval/right"] == alone["eval/all/right"]


def test_the_best_checkpoint_follows_the_first_set(tmp_path):
    sets = {"easy": "easy.jsonl", "hard": "hard.jsonl"}
    best = BestCheckpoint(Config(output_dir=str(tmp_path), eval_data=sets), 0)
    metrics = {"eval/hard/accuracy": 0.9, "eval/easy/accuracy": 0.5}
    assert best.metric_of(metrics, "right") == "eval/easy/accuracy"
    assert best.metric_of({"eval/hard/right": 0.9, "eval/easy/right": 0.5}, "right") == "eval/easy/right"
    assert best.consider(40, 0.5, "eval/easy/accuracy")
    folder = tmp_path / "checkpoint_40" / "trainer"
    folder.mkdir(parents=True)
    # an older version wrote no eval_generations, which means 0
    (folder / "state.json").write_text(
        json.dumps({"config": {"eval_data": sets, "eval_split": "test", "eval_rows": 0}})
    )

    def value(**how):
        return BestCheckpoint(Config(output_dir=str(tmp_path), **how), 40).value

    assert value(eval_data=sets) == 0.5
    assert value(eval_data={"easy": "easy.jsonl"}) == 0.5, "the first set is the same"
    kept = (tmp_path / "best.json").read_text()
    for other in ({"hard": "hard.jsonl", **sets}, {"easy": "new.jsonl"}, "easy.jsonl"):
        assert value(eval_data=other) is None
        (tmp_path / "best.json").write_text(kept)
    assert value(eval_data=sets, eval_generations=4) is None


# --- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same two steps on one, two and three processes: two held-out sets, three answers each, two stop strings."""
    folder = tmp_path_factory.mktemp("held_out")
    save_tiny(folder / "base", spread=1.5)
    for name, count in (("rows", 8), ("easy", 3), ("hard", 4)):
        questions = [{"question": f"{n}+{n}?" * (1 + n % 2), "answer": str(2 * n)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    text = "def short(completions, **columns):\n    return [float(len(text) < 12) for text in completions]\n"
    (folder / "rewards.py").write_text(text)
    config = {
        "model": "base",
        "data": "rows.jsonl",
        "eval_data": {"hard": "hard.jsonl", "easy": "easy.jsonl"},
        "eval_generations": 3,
        "rewards": {"rewards.py:short": 1.0},
        "reward_workers": 0,
        "max_steps": 2,
        "batch_size": 3,
        "num_generations": 5,
        "rollout_chunk_rows": 5,
        "max_prompt_length": 40,
        "max_generate_length": 24,
        "stop": [",", "1"],
        "deterministic": True,
        "device": "cpu",
        "report_to": "none",
        "log_samples_steps": 1,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def train(*more, nproc):
        own = ("--output_dir", f"output_{nproc}", "--runs_dir", f"runs_{nproc}")
        return fork_script("train.py", "--config", "task.yaml", *own, *more, nproc=nproc, cwd=folder)

    done = {nproc: train(nproc=nproc) for nproc in (1, 2, 3)}
    assert [one.returncode for one in done.values()] == [0, 0, 0], done[1].stderr[-2000:]
    return folder, train, done


def test_any_number_of_processes_samples_the_same(runs):
    folder, _, _ = runs
    found = []
    for nproc in (1, 2, 3):
        files = sorted(folder.glob(f"runs_{nproc}/task/rollouts-rank*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        evaluations = [metrics for metrics in metrics_of(folder / f"runs_{nproc}") if "eval/hard/accuracy" in metrics]
        found.append((sorted(lines, key=lambda line: (line["step"], line["row"])), evaluations))
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 60 and len(found[0][1]) == 2
    for line in found[0][0]:
        assert not {",", "1"} & set(line["completion"][:-2])
        assert line["finish"] == "stop" or not {",", "1"} & set(line["completion"])
    assert sum("," in line["completion"] or "1" in line["completion"] for line in found[0][0]) > 10


def test_the_console_has_a_line_for_each_set_and_the_first_one_decides(runs):
    folder, _, done = runs
    last = metrics_of(folder / "runs_1")[-1]
    lines = [line for line in done[1].stdout.splitlines() if line.startswith("held-out")]
    assert [line.split()[1] for line in lines] == ["hard", "easy", "hard", "easy"]
    shown = f"accuracy {last['eval/easy/accuracy']:.1%} (mean of 3 samples, pass@3 {last['eval/easy/pass@3']:.1%})"
    assert shown in lines[-1]
    best = json.loads((folder / "output_1/best.json").read_text())
    assert best["metric"] == "eval/hard/accuracy" and best["value"] == last["eval/hard/accuracy"]


def test_a_checkpoint_is_asked_as_it_was_trained(runs):
    folder, train, _ = runs
    assert json.loads((folder / "output_1/checkpoint_2/trainer/recipe.json").read_text())["stop"] == [",", "1"]
    changed = train("--stop", '["x"]', nproc=1)
    assert changed.returncode == 2 and "stop: [',', '1'] there, ['x'] now" in changed.stderr
    asked = fork_script("inference.py", "--checkpoint", "output_1/checkpoint_2", "--json", "1,2", cwd=folder)
    measure = ("--checkpoint", "output_1/checkpoint_2", "--samples", "3", "--out", "r.jsonl", "--seed", "42")
    done = fork_script("grpo.evaluate", *measure, "--data", "easy", cwd=folder)
    assert asked.returncode == 0 and done.returncode == 0, asked.stderr + done.stderr
    texts = [json.loads(line)["full"] for line in (folder / "r.jsonl").read_text().splitlines()]
    assert len(texts) == 9
    for text in [*texts, json.loads(asked.stdout)["text"]]:
        assert not {",", "1"} & set(text[:-2])
    last = metrics_of(folder / "runs_1")[-1]
    assert sum(len(text) < 12 for text in texts) / 9 == pytest.approx(last["eval/easy/accuracy"]), "other answers"


# --- wrong values


@pytest.mark.parametrize(
    "how, part",
    [
        ({"eval_data": {}}, "it names no set"),
        ({"eval_data": {"a b": "x"}}, "a set's name is made of letters"),
        ({"eval_data": {"../x": "x"}}, "a set's name is made of letters"),
        ({"eval_data": {"a": " "}}, "must be a file"),
        ({"eval_data": {"a": "x", "b": "x"}}, "the same questions"),
        ({"eval_data": {"a": "x"}, "eval_split_size": 0.5}, "eval_split_size: must be 0 beside eval_data"),
        ({"eval_generations": -1}, "eval_generations: must be >= 0"),
        ({"stop": [""]}, "each text must have characters"),
        ({"stop": ["a\ufffd"]}, "none may be U+FFFD"),
        ({"stop": "abc"}, "stop: must be a list of texts"),
    ],
)
def test_a_wrong_value_is_refused(how, part):
    with pytest.raises(UserError, match=re.escape(part)):
        check(Config(model="m", data="d", rewards={"r": 1.0}, **how))


@pytest.mark.parametrize("words", [["--eval_data", "{a: x, b: z, a: y}"], ['--rewards={"a": 1, "a": 2}']])
def test_a_name_given_twice_on_the_command_line_is_refused(words):
    """A YAML reader keeps the last one without a word."""
    with pytest.raises(UserError, match="'a' is set twice"):
        load_config(["--model", "m", "--data", "d", *words])


def test_a_reward_that_sees_groups_needs_whole_ones_in_an_evaluation_too():
    cfg = Config(rewards={"r": 1.0}, num_generations=4, eval_generations=16, rollout_chunk_rows=8)
    with pytest.raises(UserError, match="whole groups of 16, a chunk must hold one, got 8"):
        make_rewards(cfg, [{"sees_group": True}])


def test_a_blank_line_may_end_a_completion():
    check(Config(model="m", data="d", rewards={"r": 1.0}, stop=["\n\n", " "], eval_data={"测试.1": "x"}))


# --- held-out questions that are trained on, cannot be read, or are lacking


@pytest.fixture
def two_files(tmp_path):
    """A model's folder, training questions 0 to 3, held-out questions 3 to 5: one is in both."""
    save_tiny(tmp_path / "model")
    for name, numbers in (("train", range(4)), ("held", range(3, 6))):
        rows = [{"question": f"{n}?", "answer": str(n)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.jsonl"), "rewards": {"r": 1.0}}
    return tmp_path, Config(**values)


def test_held_out_questions_that_are_trained_on_are_counted(two_files):
    folder, cfg = two_files
    sets = {"new": str(folder / "held.jsonl"), "old": str(folder / "train.jsonl")}
    for eval_data, counts in ((sets["new"], ["1 of the 3"]), (sets, ["1 of the 3", "4 of the 4"])):
        one = dataclasses.replace(cfg, eval_data=eval_data)
        task = load_task(one)
        lines = held_out_notices(one, task.questions, task.held_out)
        assert [re.search(r"\d+ of the \d+", line)[0] for line in lines] == counts
    one = dataclasses.replace(cfg, eval_split_size=0.25, eval_steps=3, eval_generations=2)
    task = load_task(one)
    assert held_out_notices(one, task.questions, task.held_out) == []


def test_settings_of_an_evaluation_without_questions_are_named(two_files):
    _, cfg = two_files
    for values, said in (
        ({}, []),
        ({"eval_steps": 3}, ["eval_steps"]),
        ({"eval_generations": 3}, ["eval_generations"]),
    ):
        one = dataclasses.replace(cfg, **values)
        lines = held_out_notices(one, load_task(one).questions, {})
        assert [line.split(": ")[1] for line in lines] == said


@pytest.mark.parametrize("named", [True, False])
def test_a_held_out_set_that_cannot_be_read_is_named(two_files, named):
    _, cfg = two_files
    eval_data = {"a": cfg.data, "b": "none.jsonl"} if named else "none.jsonl"
    with pytest.raises(UserError, match=rf"^eval_data: {'b: ' if named else ''}no such file 'none.jsonl'"):
        load_task(dataclasses.replace(cfg, eval_data=eval_data))
    with pytest.raises(UserError, match=r"^data: no such file 'none.jsonl'"):
        load_task(dataclasses.replace(cfg, data="none.jsonl", eval_data=cfg.data))
