"""What reward functions do under TRL beside returning scores: coroutines, trainer_state, log_extra, log_metric."""

import contextlib
import functools
import json
import time

import pytest

from grpo.checkpoints.fingerprints import fingerprints
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.errors import UserError
from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Call, read_answer
from grpo.rewards.functions import describe
from grpo.rewards.gold_check import check_needed_columns, open_checked_rewards
from grpo.rewards.logged import MAX_BYTES, Log, Logs, is_logged, means, taken
from grpo.rewards.pool import InProcess, open_rewards
from tests.support.asking_rewards import answers_of
from tests.support.launcher import fork_script
from tests.support.tiny import save_tiny, tiny_tokenizer

FILE = '''
import asyncio, os, time
import helpers

running = peak = 0
kept = None  # belongs to one event loop


async def waits(completions, **columns):
    """Its score is how many calls run at once at most, once all of them have begun."""
    global running, peak
    running += 1
    peak = max(peak, running)
    await asyncio.sleep(0.2)
    running -= 1
    return [float(peak)]


async def trouble(completions, **columns):
    global kept
    import late_helpers  # beside this file, imported in the coroutine
    kept = kept or asyncio.Lock()
    async with kept:
        pass
    [text] = completions
    if text == "hangs":
        await asyncio.Event().wait()
    if text == "blocks":
        time.sleep(60)
    if text == "exits":
        os._exit(0)
    if text == "leaves":
        raise SystemExit(3)
    if text == "cancels":
        raise asyncio.CancelledError
    if text == "odd":
        return "no scores"
    return [late_helpers.SCORE]


class Judge:
    async def __call__(self, completions, **columns):
        return [3.0]


judge = Judge()


def hidden(completions, **columns):
    return waits(completions)


async def group(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(completions))] * len(completions)


group.sees_group = True


async def code(completions, **columns):
    await asyncio.sleep(0)
    return [float(os.getpid())]


code.runs_code = True


def logs(completions, trainer_state, log_extra=None, log_metric=None, **columns):
    log_extra("length", [len(text) for text in completions])
    log_extra("first", [text[:1] for text in completions])
    log_metric("mean_length", len(completions[0]))
    return [trainer_state.global_step / trainer_state.max_steps]


def by_keyword(completions, **kwargs):
    kwargs["log_metric"]("seen", 1)
    return [float(sorted(kwargs) == ["answer", "completion_ids", "log_metric", "prompts"])]


def too_much(completions, log_extra, **columns):
    log_extra("text", ["x" * 300_000])
    return [1.0]


def two_values(completions, log_extra, **columns):
    log_extra("text", [1, 2])
    return [1.0]


def not_a_number(completions, log_metric, **columns):
    log_metric("x", float("nan"))
    return [1.0]
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(FILE)
    (folder / "helpers.py").write_text("")
    (folder / "late_helpers.py").write_text("SCORE = 2.5\n")
    return folder / "mine.py"


@pytest.fixture(params=[2, 0], ids=["workers", "in the trainer"])
def opened(file, request):
    @contextlib.contextmanager
    def open_them(*names, **how):
        cfg = Config(rewards={f"{file}:{name}": 1.0 for name in names}, **{"reward_workers": request.param, **how})
        with contextlib.closing(open_rewards(cfg, print)) as rewards:
            yield rewards

    open_them.workers = request.param
    return open_them


def inputs_of(*texts):
    return [RewardInput("question", text, [1], {"answer": "4"}) for text in texts]


def ask(rewards, *texts, k=0):
    return answers_of(rewards, inputs_of(*texts), [Call(k, (row,)) for row in range(len(texts))])


def scores(answers):
    return [answer.outcomes[0] for answer in answers]


def test_sixteen_coroutines_wait_at_the_same_time(opened):
    """One after the other they take 3.2 s. The score of each says how many were running: 8 in each of two workers."""
    with opened("waits") as rewards:
        ask(rewards, "warm")
        began = time.monotonic()
        found = scores(ask(rewards, *["text"] * 16))
        took_s = time.monotonic() - began
    assert max(found) == (8.0 if opened.workers else 16.0)
    assert took_s < 1.6


def test_one_that_is_no_coroutine_function_is_awaited_too(opened):
    with opened("hidden", "judge") as rewards:
        assert scores(ask(rewards, "a", "b")) == [1.0, 1.0]  # one by one: nothing says that it gives a coroutine
        assert scores(ask(rewards, "a", k=1)) == [3.0] and rewards.rewards[1].is_async


def test_groups_and_code(opened):
    with opened("group", "code", rollout_chunk_rows=8) as rewards:
        calls = [Call(0, (0, 1, 2)), Call(1, (0,)), Call(1, (1,))]
        group, *alone = answers_of(rewards, inputs_of("a", "b", "c"), calls)
        assert group.outcomes == [3.0] * 3
        assert all(answer.outcomes[0] > 0 for answer in alone)


def test_what_one_coroutine_does_costs_the_others_nothing(file):
    texts = ["a", "hangs", "b", "exits", "c", "blocks", "leaves", "d", "cancels", "odd"]
    cfg = Config(rewards={f"{file}:trouble": 1.0}, reward_workers=1, reward_timeout_s=1.0)
    with contextlib.closing(open_rewards(cfg, print)) as rewards:
        answers = ask(rewards, *texts)
        assert scores(ask(rewards, "e", "f")) == [2.5, 2.5]  # in the next round
    found = dict(zip(texts, answers, strict=True))
    assert [found[text].outcomes for text in "abcd"] == [[2.5]] * 4
    for text in ("hangs", "blocks"):
        assert found[text].timeout and "no answer within 1 s" in found[text].outcomes[0]
    assert "exit code 0" in found["exits"].outcomes[0] and "SystemExit: 3" in found["leaves"].outcomes[0]
    assert "CancelledError" in found["cancels"].outcomes[0] and "returned str" in found["odd"].outcomes[0]


def test_many_that_hang_cost_one_time_limit(file):
    cfg = Config(rewards={f"{file}:trouble": 1.0}, reward_workers=1, reward_timeout_s=0.8)
    with contextlib.closing(open_rewards(cfg, print)) as rewards:
        ask(rewards, "warm")
        began = time.monotonic()
        answers = ask(rewards, "a", *["hangs"] * 12, "b")
        took_s = time.monotonic() - began
    assert [answer.timeout for answer in answers] == [False, *[True] * 12, False] and took_s < 6


def test_a_request_to_stop_ends_the_waiting(opened):
    with opened("trouble") as rewards:
        beats = iter([False] * 3)
        began = time.monotonic()
        calls = [Call(0, (0,))]
        assert answers_of(rewards, inputs_of("hangs"), calls, lambda: next(beats, True)) == [None]
        assert time.monotonic() - began < 8


def test_state_and_logs(opened):
    with opened("logs", "by_keyword") as rewards:
        first, second = ask(rewards.at(3, 12), "ab", "cde")
        assert first.outcomes == second.outcomes == [0.25]
        assert first.columns == {"length": [2], "first": ["a"]} and second.metrics == {"mean_length": [3.0]}
        [third] = ask(rewards, "x", k=1)
        assert third.outcomes == [1.0] and third.metrics == {"seen": [1.0]}
    assert list(rewards.rewards[0].takes) == ["trainer_state", "log_extra", "log_metric"]
    assert list(rewards.rewards[1].takes) == ["log_metric"]


def test_wrong_values_are_failures_that_say_so(opened):
    with opened("too_much", "two_values", "not_a_number") as rewards:
        found = [scores(ask(rewards, "a", k=k))[0] for k in range(3)]
    assert "more than 256 KiB in one call" in found[0]
    assert "2 values for 1 completions" in found[1] and "expected a finite number" in found[2]


def test_they_are_no_parameters(file):
    parameters = {f"{file}:logs": {"log_extra": 1}}
    cfg = Config(rewards={f"{file}:logs": 1.0}, reward_parameters=parameters, reward_workers=0)
    with pytest.raises(UserError, match="no parameter 'log_extra'"):
        open_rewards(cfg, print)


def test_a_function_without_them_gets_none_of_them():
    seen = {}
    rewards = InProcess.of({"f": lambda completions, **columns: (seen.update(columns), [1.0])[1]})
    ask(rewards, "a")
    assert set(seen) == {"prompts", "completion_ids", "answer"} and taken(print) == ()


def test_what_is_logged_is_made_plain():
    import numpy as np

    log = Log(1)
    log.extra("a", [np.float32(0.5)])
    log.extra("b", [{"x": (1, float("inf")), 2: object}])
    log.extra("c", np.array([7]))
    log.extra("d", ["\ud800"])
    assert log.columns["a"] == [0.5] and log.columns["c"] == [7] and log.columns["d"] == ["\\ud800"]
    assert log.columns["b"] == [{"x": [1, "inf"], "2": "<class 'object'>"}]
    for name in ("", "x" * 101, "a\nb", 3):
        with pytest.raises(ValueError, match="the name must be"):
            log.metric(name, 1)
    log.size = MAX_BYTES
    with pytest.raises(ValueError, match="256 KiB"):
        log.metric("more", 1)


@pytest.mark.parametrize(
    "answer",
    [
        {"scores": [1.0], "columns": {"a": [1, 2]}, "metrics": {}},
        {"scores": [1.0], "columns": {"a\n": [1]}, "metrics": {}},
        {"scores": [1.0], "columns": {}, "metrics": {"a": [float("nan")]}},
        {"scores": [1.0], "columns": {}, "metrics": {"a": ["x"]}},
        {"scores": [1.0], "columns": {}, "metrics": {"a": 1.0}},
        {"scores": [1.0], "columns": {}, "metrics": {str(i): [1.0] for i in range(65)}},
        {"scores": [1.0], "columns": []},
        {"scores": [1.0]},
        {"late": "soon"},
        {},
    ],
)
def test_a_forged_answer_is_none(answer):
    [reason] = read_answer(b"A" + json.dumps(answer).encode(), Call(0, (0,))).outcomes
    assert "no answer" in reason
    assert is_logged({"a": [1]}, {"b": [1.0]}, 1)


def test_a_name_that_two_functions_log():
    logs = Logs()
    logs.add("f", [4, 5], {"a": [1, 2]}, {"m": [1.0, 2.0]})
    logs.add("g", [4], {"a": [3]}, {"m": [6.0]})
    assert logs.columns == {4: {"a": 1, "g.a": 3}, 5: {"a": 2}}
    assert logs.sums() == {"m": (9.0, 3)} and means([logs.sums(), {"m": (3.0, 1)}]) == {"user/m": 3.0}


def test_calls_of_one_file_share_a_lane():
    lanes = [Reward(name, 1.0, is_async=True).lane for name in ("a.py:f", "a.py:g@x", "b.py:f", "f")]
    assert lanes[0] == lanes[1] and len(set(lanes)) == 3
    assert Reward("f", 1.0).lane == Reward("b.py:f", 1.0).lane != Reward("f", 1.0, is_async=True).lane


def test_an_older_run_is_not_continued_with_a_state_that_it_did_not_pass():
    """A function with trainer_state=None got none then; a checkpoint without the fact is refused."""
    cfg = Config(model="some/model")
    found = [
        fingerprints(cfg, Questions([], 0), [Reward("f", 1.0, takes=takes)], tiny_tokenizer())
        for takes in ((), ("log_extra", "log_metric"), ("trainer_state",))
    ]
    assert found[0] == found[1] != found[2] == {**found[0], "reward_arguments": "trainer_state"}


def test_a_function_that_reads_the_length_of_the_run_fixes_it():
    """Elsewhere a run with a constant rate may be extended: max_steps is not compared then."""
    by_length = Reward("f", 1.0, takes=("trainer_state",), source="state.global_step / state.max_steps")
    found = {
        fingerprints(Config(model="m", max_steps=n), Questions([], 0), [by_length], tiny_tokenizer())[
            "reward_arguments"
        ]
        for n in (10, 20)
    }
    assert len(found) == 2


RUN_FILE = """
import asyncio


async def varied(completions, trainer_state, log_extra, log_metric, **columns):
    await asyncio.sleep(0.01)
    score = sum(map(ord, completions[0])) % 7
    log_extra("score", [score])
    log_metric("score", score)
    if trainer_state.global_step == 0:
        log_metric("first step only", 1)
    return [float(score + trainer_state.global_step)]
"""


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_whole_run(tmp_path, nproc):
    """The mean that is logged is that of all ranks' completions: the log of completions has each value."""
    save_tiny(tmp_path / "base", "qwen3")
    (tmp_path / "mine.py").write_text(RUN_FILE)
    settings = {
        "model": tmp_path / "base",
        "data": "demo/train.jsonl",
        "answer_format": "hash",
        "data_rows": 8,
        "prompt_template": "{question}\n",
        "chat_template": "false",
        "max_prompt_length": 100,
        "max_steps": 2,
        "rewards": f'{{"{tmp_path}/mine.py:varied": 1.0}}',
        "batch_size": 2,
        "num_generations": 4,
        "rollout_chunk_rows": 4,
        "max_generate_length": 8,
        "log_samples_steps": 1,
        "log_completions_steps": 1,
        "eval_split_size": 2,
        "device": "cpu",
        "report_to": "none",
        "output_dir": tmp_path / "output",
        "runs_dir": tmp_path / "runs",
        "run_name": "r",
    }
    args = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    done = fork_script("train.py", *args, nproc=None if nproc == 1 else nproc)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    rows = [
        json.loads(line)
        for path in (tmp_path / "runs/r").glob("rollouts-rank*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == 2 * len({row["row"] for row in rows}) >= 16
    for at, line in enumerate(steps):
        values = [row["extra"]["score"] for row in rows if row["step"] == at + 1]
        assert line["user/score"] == pytest.approx(sum(values) / len(values))
        assert line["reward/mean"] == pytest.approx(line["user/score"] + at)
        assert ("user/first step only" in line) == (at == 0)
    assert any("eval/user/score" in line for line in lines)
    assert "score" in done.stdout


# --- columns that a function asks for


def asks(completions, solution, *, level, trainer_state, limit=3, **columns):
    return [1.0] * len(completions)


@functools.wraps(asks)
def wrapped(completions, **columns):
    return asks(completions, "4", level=1, trainer_state=None)


def test_a_column_that_a_function_asks_for_is_missed_before_training():
    rewards = [Reward(one.__name__, 1.0, **describe(one, "f")) for one in (asks, wrapped)]
    assert [list(reward.needs) for reward in rewards] == [["solution", "level"], []]
    check_needed_columns(rewards, [{"solution": "4", "level": 1}])
    check_needed_columns(rewards, [])
    with pytest.raises(UserError, match="asks asks for the column 'level', which the data lack, only answer, solution"):
        check_needed_columns(rewards, [{"solution": "4", "answer": "4"}])
    assert describe(asks, "asks", {"level": 2})["needs"] == ["solution"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_run_says_which_column_is_missing_with_and_without_workers(tmp_path, workers):
    (tmp_path / "r.py").write_text("def f(completions, solution, **columns):\n    return [1.0]\n")
    cfg = Config(rewards={f"{tmp_path}/r.py:f": 1.0}, reward_workers=workers)
    with pytest.raises(UserError, match=r"r\.py:f asks for the column 'solution'.*column_names"):
        open_checked_rewards(cfg, [{"answer": "4"}], is_main=True)
