"""What a run shows of its completions and results: whichever rank sampled them, and only what the numbers mean."""

import functools
import json

import numpy as np
import pytest
from rich.console import Console as RichConsole
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.checkpoints.best import BestCheckpoint
from grpo.config.settings import Config
from grpo.evaluate.held_out import right_answers
from grpo.rewards import Reward
from grpo.rewards.functions import describe
from grpo.run.completions_log import Rollout, answer_marks, as_markdown, as_table
from grpo.run.console import sft_line, step_line
from grpo.run.log import RunLog
from grpo.runtime.distributed import World
from grpo.training.metrics import PHASES
from tests.support.launcher import fork_script, patched_train

TINY = ("--max_steps", "1", "--save_steps", "0", "--eval_data", "null", "--num_threads", "1")
RANK_1_TAKES_ALL = """
from grpo.runtime.distributed import World
World.deal = lambda self, count: iter(range(count) if self.rank == 1 else ())
"""


@pytest.mark.parametrize("patch", ["", RANK_1_TAKES_ALL], ids=["dealt", "rank 1 takes all"])
def test_two_ranks_show_the_first_rows_whoever_sampled_them(tmp_path, patch):
    """Before, with rank 1 taking every chunk: no table, no text, code 0."""
    shown = ("--log_completions_steps", "1", "--log_samples_steps", "1")
    settings = (*TINY, *shown, "--max_generate_length", "24", "--rollout_chunk_rows", "8")
    folders = ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"))
    done = fork_script(patched_train(tmp_path, patch), *settings, *folders, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("completions of step 1") == 1 and "extracted" in done.stdout
    [events] = (tmp_path / "runs").rglob("events.out.tfevents*")
    curves = EventAccumulator(str(events.parent)).Reload()
    [tag] = [tag for tag in curves.Tags()["tensors"] if "samples" in tag]
    [text] = [event.tensor_proto.string_val[0].decode() for event in curves.Tensors(tag)]
    rows = {}
    for rank in (0, 1):
        lines = (tmp_path / f"runs/demo/rollouts-rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
        rows |= {row["row"]: row for row in map(json.loads, lines)}
        assert not (patch and rank == 0 and lines), "rank 0 sampled none"
    assert sorted(rows) == list(range(64)) and text.count("**question**") == 4
    for row in range(4):  # of the step, whichever rank has them
        assert rows[row]["question"].split("\n")[0] in text
        after = rows[row]["completion"].rpartition("####")
        assert rows[row]["extracted"] == (after[2].strip() if after[1] else None)


ROLLOUT = Rollout(1, 0, "2+2?", "4", "so #### 4.0", "stop", {"f": -0.0}, -0.0, -0.0, extracted="4.0")


def test_the_table_and_the_text_show_what_was_extracted():
    """The control: without marks there is no such column."""
    console = RichConsole(width=120, record=True)
    console.print(as_table([ROLLOUT], "en", extracts=True))
    shown, markdown = console.export_text(), as_markdown([ROLLOUT], "en", extracts=True)
    assert "extracted" in shown and "4.0" in shown and "**extracted** 4.0, **gold** 4" in markdown
    assert "+0.000" in shown and "-0" not in shown and "-0" not in markdown
    console.print(as_table([ROLLOUT]))
    assert "extracted" not in console.export_text() and "extracted" not in as_markdown([ROLLOUT])


def starting(completions, *, start="[[", end="]]", **columns):
    return [1.0]


@pytest.mark.parametrize(
    "settings, given, marks",
    [
        ({}, None, None),
        ({"answer_format": "hash"}, None, ("####", "")),
        ({"system_prompt": "Use <answer>…</answer>."}, None, ("<answer>", "</answer>")),
        ({"prompt_template": "{question} <SOLUTION>", "answer_format": "hash"}, None, ("<SOLUTION>", "</SOLUTION>")),
        ({"example_answer": "so #### 4"}, None, ("####", "")),
        ({"answer_format": "hash"}, {}, ("[[", "]]")),  # what the reward reads comes first
        ({"answer_format": "hash"}, {"start": "A:", "end": ""}, ("A:", "")),
    ],
)
def test_the_marks_are_those_of_the_reward_or_of_the_prompt(settings, given, marks):
    rewards = [Reward("plain", 1.0)]
    if given is not None:
        rewards.append(Reward("starting", 1.0, **describe(starting, "starting", given)))
    assert answer_marks(Config(**settings), rewards) == marks


# --- held-out questions

NAN = float("nan")


@pytest.mark.parametrize(
    "scores, how, share",
    [
        ([1, 0, 1, 1], {}, 0.75),
        ([1, 0, NAN, 1], {}, 0.5),  # a question without a score is not answered right
        ([0, 0, 0, 0], {}, 0.0),
        ([0.1, 0.2, 0.3, 0.4], {}, None),  # before, 100 %
        ([1, 1, 1, 0.99], {}, None),
        ([-1, 1, 1, -1], {}, None),
        ([2, 0, 2, 0], {}, None),
        ([2, 0, 2, 0], {"right": 2.0}, 0.5),
        ([1, 0.4, 0.4, 0], {"worth_of_refusal": 0.4}, 0.25),
        ([1, 0.4, 0.4, 0], {}, None),
        ([NAN, NAN], {}, None),
        ([], {}, None),
    ],
)
def test_accuracy_is_of_a_reward_that_says_right_or_wrong(scores, how, share):
    right = right_answers(np.array(scores, dtype=float), Reward("f", 1.0, **how))
    assert (None if right is None else right.mean()) == share


def run_log(tmp_path, **settings):
    cfg = Config(rewards={"my.py:dense": 1.0, "mark_reward": 1.0}, output_dir=str(tmp_path), save_steps=1, **settings)
    (tmp_path / "run").mkdir(exist_ok=True)
    log = RunLog(cfg, World(0, 1, 0, 1, None), tmp_path / "run")
    log.best, log.total = BestCheckpoint(cfg, 0), 100
    return log


def test_the_line_and_best_json_name_the_mean_of_a_graded_reward(tmp_path, capsys):
    """Before: accuracy 100.0% at both steps, and the first one stayed the best."""
    log = run_log(tmp_path)
    log.log_eval(1, {"eval/dense": 0.25, "eval/mark_reward": 0.0, "eval/length_mean": 7.0})
    log.log_eval(2, {"eval/dense": 0.5, "eval/mark_reward": 0.0, "eval/length_mean": 7.0})
    log.log_eval(3, {"eval/accuracy": 1.0, "eval/dense": 1.0, "eval/length_mean": 7.0})  # all 1 by chance
    log.log_eval(4, {"eval/accuracy": 0.0, "eval/dense": 0.0, "eval/length_mean": 7.0})
    log.log_eval(5, {"eval/dense": -0.0001, "eval/length_mean": 7.0})
    log.log_eval(6, {"eval/length_mean": 7.0})
    shown = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        "mean dense 0.250 (greedy), length 7.0",
        "mean dense 0.500 (greedy), length 7.0",
        "accuracy 100.0% (greedy), length 7.0",
        "accuracy 0.0% (greedy), length 7.0",
        "mean dense 0.000 (greedy), length 7.0",
        "mean dense none (greedy), length 7.0",
    ]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "checkpoint_3", "step": 3, "metric": "eval/dense", "value": 1.0}


def test_a_best_accuracy_of_an_older_version_does_not_stay_for_ever(tmp_path):
    """It was the share above 0, often 1.0, which no mean exceeds."""
    (tmp_path / "checkpoint_1" / "trainer").mkdir(parents=True)
    state = {"config": {"eval_data": None, "eval_split": "test", "eval_rows": 0}}
    (tmp_path / "checkpoint_1" / "trainer" / "state.json").write_text(json.dumps(state))
    old = {"checkpoint": "checkpoint_1", "step": 1, "metric": "eval/accuracy", "value": 1.0}
    log = run_log(tmp_path)
    (tmp_path / "best.json").write_text(json.dumps(old))
    log.best = BestCheckpoint(log.cfg, 1)
    assert log.best.value == 1.0
    log.log_eval(2, {"eval/dense": 0.5, "eval/length_mean": 7.0})
    log.log_eval(3, {"eval/dense": 0.4, "eval/length_mean": 7.0})
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2


# --- the step's line


def metrics(**given):
    times = {f"time/{phase}_s": 0.0 for phase in (*PHASES, "step")}
    rest = {"completions/length_mean": 7.0, "grad_norm": 0.0, "tokens_per_s": 1.0}
    return times | rest | {"loss": 0.0, "reward/mean": 0.0, "reward/std": 0.0} | given


@pytest.mark.parametrize("value", [-0.0, -1e-9, -4e-6])
def test_no_number_is_minus_zero(value):
    """The control: a number that is shown keeps its sign."""
    line = step_line(1, 2, metrics(loss=value, kl=value, **{"reward/mean": value}))
    assert "reward 0.000±0.000  grpo_loss: 0.0000" in line and "kl 0.00000" in line and "-" not in line
    assert "-" not in sft_line(1, 2, metrics(**{"sft/loss": value}))
    assert "reward -0.001±0.000  grpo_loss: -0.0001" in step_line(1, 2, metrics(loss=-6e-5, **{"reward/mean": -6e-4}))


def test_a_step_without_rewards_says_so():
    without = {name: value for name, value in metrics().items() if not name.startswith("reward/")}
    assert "reward none  grpo_loss: 0.0000  length" in step_line(1, 2, without)


NONE = """
def f_reward(completions, question, **columns):
    return [None for _ in completions]
"""


def test_a_run_whose_rewards_are_all_none_warns_once(tmp_path):
    """Two functions of one name beside each other: two curves of failures, one warning, no mean."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(NONE)
    rewards = json.dumps({f"{tmp_path}/{name}.py:f_reward": 1.0 for name in ("a", "b")})
    run = functools.partial(fork_script, "train.py", "--rewards", rewards, "--max_generate_length", "8")
    done = run(*TINY[2:], "--max_steps", "2", "--output_dir", str(tmp_path / "o"), "--runs_dir", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("reward none") == 2
    assert done.stderr.count("warning: step 1: no completion has a reward") == 1 and "step 2: no" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r/demo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert "reward/mean" not in row and row["reward/a.f_reward/failures"] == row["reward/b.f_reward/failures"] == 0
