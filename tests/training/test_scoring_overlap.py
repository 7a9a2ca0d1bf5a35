"""Rewards are called while other completions are still sampled, and only the time changes.

The overlap is shown without a clock: an engine holds completions back until a reward has written a file, which it only
does when it is called meanwhile. The control is the same engine without `on_finished`.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.evaluate.held_out import evaluate
from grpo.rewards import RewardInput, supervisor_handle
from grpo.rewards import pool as pool_module
from grpo.rewards.calls import Packed
from grpo.rewards.pool import open_rewards
from grpo.rollout import rollout
from grpo.rollout.engine import NativeEngine
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import FittingSize
from grpo.training.scoring import FAILED, LATE, Scoring
from grpo.types import Completion, Prompt
from tests.support.launcher import fork_script, metrics_of, patched_train
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
WITHIN_S = 60.0  # only a failing test waits that long
HANGS, CUT = 250, 251  # first tokens
REWARDS = """
import pathlib
import time


def row(completion_ids, folder, **columns):
    [ids] = completion_ids
    pathlib.Path(folder[0], f"row {ids[0]}").touch()
    while ids[0] == 250:
        time.sleep(1)
    if ids[0] % 5 == 1:
        raise ValueError(f"row of {ids}")
    return [None if ids[0] % 7 == 3 else ids[0] / 3]


def group(completion_ids, folder, **columns):
    pathlib.Path(folder[0], f"group {completion_ids[0][0]}").touch()
    if completion_ids[0][0] % 4 == 1:
        raise ValueError(f"group of {completion_ids}")
    return [i + ids[0] / 7 for i, ids in enumerate(completion_ids)]


def code(completion_ids, **columns):
    if completion_ids[0][0] % 3 == 1:
        raise KeyError(completion_ids[0][0])
    return [len(completion_ids[0]) + completion_ids[0][0] / 9]


group.sees_group = True
code.runs_code = True
"""
G, ROWS = 3, 9


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Calls are early from the first round on, even for cheap rewards."""
    monkeypatch.setattr(pool_module, "EARLY_S", 0.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@contextlib.contextmanager
def opened(file, *names, **how):
    rewards = {f"{file}:{name}": 1.0 for name in names}
    with contextlib.closing(open_rewards(Config(rewards=rewards, **{"reward_workers": 2, **how}), print)) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool(file):
    with opened(file, "row", "group", "code") as pool:
        yield pool


@pytest.fixture(scope="module")
def in_process(file):
    with opened(file, "row", "group", "code", reward_workers=0) as rewards:
        yield rewards


def prompts_in(folder):
    return [Prompt(p, f"q{p}", (1, 2), {"folder": str(folder), "answer": "4"}) for p in range(ROWS // G)]


def completion(row, token):
    return Completion(row, np.array([token, 5], np.int32), np.zeros(2, np.float32), "stop")


def scoring_of(rewards, folder, reports, pulse=lambda: False):
    cfg = Config(num_generations=G)
    return Scoring(cfg, rewards, prompts_in(folder), tiny_tokenizer(), reports.append, pulse)


def until(there, pulse):
    """Pulse until `there` returns True, as an engine does between tokens. Returns whether it did."""
    deadline = time.monotonic() + WITHIN_S
    while not there() and time.monotonic() < deadline:
        pulse()
        time.sleep(0.002)
    return there()


# --- the same scores


def same(one, other):
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.faults, other.faults)
    assert one.inputs == other.inputs and one.completions is other.completions


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(5, 249), min_size=ROWS, max_size=ROWS),
    st.permutations(range(ROWS)),
    st.permutations(range(ROWS)),
    st.lists(st.integers(1, 4), min_size=ROWS, max_size=ROWS),
    st.booleans(),
)
def test_scores_do_not_depend_on_when_completions_were_taken(
    pool, in_process, tmp_path_factory, tokens, arrival, order, sizes, looks
):
    """Rows, groups, code, failures: as when all are scored at the end, in this process; the reports as well."""
    folder, reports, expected = tmp_path_factory.getbasetemp(), [], []
    made = [completion(row, tokens[row]) for row in range(ROWS)]
    in_order = [made[row] for row in order]
    scoring = scoring_of(pool, folder, reports)
    waiting = [made[row] for row in arrival]
    for size in sizes:
        scoring.take(waiting[:size])
        waiting = waiting[size:]
        if looks:
            time.sleep(pool_module.LOOK_S)
            scoring.pulse()
    same(scoring.finish(in_order), scoring_of(in_process, folder, expected).finish(in_order))
    assert reports == expected


def test_a_deadline_costs_its_own_row_whenever_it_was_taken(file, tmp_path):
    made = [completion(n, token) for n, token in enumerate((HANGS, 7, 8, 12, HANGS, 14))]
    outcomes = []
    with opened(file, "row", "group", reward_timeout_s=1.5) as pool:
        for arrival in ([], [4, 1, 0, 2, 5, 3]):  # the first: all at the end
            reports: list[str] = []
            scoring = scoring_of(pool, tmp_path, reports)
            for row in arrival:
                scoring.take([made[row]])
            outcomes.append((scoring.finish(made), reports))
    (end, reports_end), (early, reports_early) = outcomes
    same(early, end)
    assert early.faults[:, 0].tolist() == [LATE, 0, 0, 0, LATE, 0] and not early.faults[:, 1].any()
    assert reports_early == reports_end and len(reports_end) == 2 and "no answer within 1.5 s" in reports_end[0]


def test_memory_that_runs_out_gives_no_completion_twice(pool, in_process, tmp_path):
    """The engine starts again with fewer rows; rows that were final before are not sampled again."""
    cfg = Config(num_generations=G, rollout_chunk_rows=ROWS, max_generate_length=16, batch_size=ROWS // G)
    engine = NativeEngine(tiny_model("qwen3", spread=2.0), range(150), cfg.max_generate_length, cfg.seed)
    embeddings, left = engine.model.get_input_embeddings(), [4]
    plain = embeddings.forward

    def forward(input_ids):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(input_ids)

    embeddings.forward = forward
    reports, expected, taken = [], [], []
    scoring = scoring_of(pool, tmp_path, reports)

    plain_take = scoring.take

    def take(completions):
        taken.append((left[0], [one.row for one in completions]))
        plain_take(completions)

    scoring.take = take
    completions = rollout(engine, prompts_in(tmp_path), range(100), cfg, ALONE, scoring)
    scored = scoring.finish(completions)
    assert engine.fitting.halvings == 1 and [one.row for one in completions] == list(range(ROWS))
    assert any(when > 0 for when, _ in taken), "no row was final before memory ran out: the test shows nothing"
    assert sorted(row for _, some in taken for row in some) == list(range(ROWS))
    same(scored, scoring_of(in_process, tmp_path, expected).finish(completions))
    assert reports == expected


# --- at the same time


class Holding:
    """An engine that holds completions back until a file is there: within its n-th call, or before it."""

    fitting = FittingSize("rollout", "rollout_chunk_rows", "rows")
    chunk_rows = None

    def __init__(self, file, call, first):
        """first: rows that are finished, in this order, before it waits."""
        self.file, self.call, self.first = file, call, first
        self.calls, self.came = 0, False

    def generate(self, requests, sampling, pulse, *, on_finished=None):
        made = {request.row: completion(request.row, 10 + request.row) for request in requests}
        waits = self.calls == self.call
        self.calls += 1
        early = [made[row] for row in self.first] if waits else []
        for one in early:
            on_finished([one])
        if waits:
            self.came = until(self.file.exists, pulse)
        on_finished([one for one in made.values() if one not in early])
        return list(made.values())


WHERE = {  # file, call that waits, what is finished before
    "rows of a chunk": ("row 12", 0, [2]),
    "a group of a chunk": ("group 13", 0, [5, 3, 0, 4]),
    "the chunk before": ("group 13", 1, []),
}


@pytest.mark.parametrize("where", WHERE)
def test_rewards_are_called_while_others_are_sampled(pool, in_process, tmp_path, where):
    name, call, first = WHERE[where]
    cfg = Config(num_generations=G, rollout_chunk_rows=2 * G, batch_size=ROWS // G)
    engine, reports = Holding(tmp_path / name, call, first), []
    scoring = scoring_of(pool, tmp_path, reports)
    completions = rollout(engine, prompts_in(tmp_path), range(100), cfg, ALONE, scoring)
    assert engine.came, "no reward was called before the rest was sampled"
    same(scoring.finish(completions), scoring_of(in_process, tmp_path, []).finish(completions))


def test_without_on_finished_all_is_scored_at_the_end(pool, tmp_path, monkeypatch):
    """The control: the same engine, whose finished completions are ignored."""
    monkeypatch.setattr("tests.training.test_scoring_overlap.WITHIN_S", 0.5)
    cfg = Config(num_generations=G, rollout_chunk_rows=2 * G, batch_size=ROWS // G)
    engine = Holding(tmp_path / "row 12", 0, [2])
    scoring = scoring_of(pool, tmp_path, [])
    scoring.take = lambda completions: None
    completions = rollout(engine, prompts_in(tmp_path), range(100), cfg, ALONE, scoring)
    assert not engine.came and np.isfinite(scoring.finish(completions).scores[2, 0])


def test_evaluation_scores_while_it_samples(pool, tmp_path):
    cfg = Config(rollout_chunk_rows=2)
    questions = Questions([Prompt(p, f"q{p}", (1,), {"folder": str(tmp_path), "answer": "4"}) for p in range(5)], 0)
    engine, reports = Holding(tmp_path / "row 11", 1, []), []
    metrics = evaluate(engine, questions, pool, tiny_tokenizer(), cfg, ALONE, reports.append)
    assert engine.came and metrics["eval/length_mean"] == 2.0
    assert metrics["eval/row"] == pytest.approx(np.mean([12 / 3, 13 / 3, 14 / 3]))  # None for 10, 11 raises
    assert len(reports) == 4 and "row of [11, 5]" in reports[0]


PATCH = """
import grpo.rewards.pool
grpo.rewards.pool.EARLY_S = 0.0
import pathlib, time
from grpo.rollout.engine import NativeEngine
plain, folder = NativeEngine.generate, pathlib.Path({folder!r})
def generate(self, requests, sampling, pulse, on_finished):
    for old in folder.glob("row *"):
        old.unlink()
    made = plain(self, requests[:1], sampling, pulse, on_finished=on_finished)
    until = time.monotonic() + 60
    while not list(folder.glob("row *")) and time.monotonic() < until:
        pulse()
        time.sleep(0.002)
    with open(folder / "log", "a") as log:
        print(len(list(folder.glob("row *"))) > 0, file=log)
    return made + plain(self, requests[1:], sampling, pulse, on_finished=on_finished)
NativeEngine.generate = generate
"""


@pytest.mark.full
def test_a_run_scores_while_it_samples(file, tmp_path):
    """train.py, two steps and two evaluations: every chunk finds its first row scored before its last is sampled."""
    save_tiny(tmp_path / "model")
    rows = [{"question": f"{n}+1?", "answer": "#### 4", "folder": str(tmp_path)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fork_script(
        patched_train(tmp_path, PATCH.format(folder=str(tmp_path))),
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--eval_data",
        str(tmp_path / "rows.jsonl"),
        "--rewards",
        json.dumps({f"{file}:row": 1.0}),
        "--max_reward_failures",
        "1",
        "--max_steps",
        "2",
        "--num_generations",
        "2",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--max_prompt_length",
        "64",
        "--max_generate_length",
        "8",
        "--output_dir",
        str(tmp_path / "output"),
        "--runs_dir",
        str(tmp_path / "runs"),
        "--save_steps",
        "0",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "log").read_text().split() == ["True"] * 4
    assert [row["reward/failures"] for row in metrics_of(tmp_path / "runs") if "reward/failures" in row] != []


def test_only_rewards_that_take_their_time_are_called_early(file, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "MEASURED_ROUNDS", 3)
    made = [completion(n, 9 + 5 * n) for n in range(2)]

    def begins_early(pool):
        scoring = scoring_of(pool, tmp_path, [])
        scoring.take(made)
        early = bool(scoring.submitted)
        scoring.finish(made)
        return early

    for limit_s, expected in ((1e-9, [False, True, False, True]), (1e9, [False] * 4)):  # the third is measured anew
        monkeypatch.setattr(pool_module, "EARLY_S", limit_s)
        with opened(file, "row") as pool:
            assert [begins_early(pool) for _ in range(4)] == expected


# --- when something happens in between


def test_a_stop_leaves_scores_without_failures(file, tmp_path):
    """Running calls are dropped at once; completions that were cut never reach a reward."""
    asked, reports = [], []
    made = [completion(n, token) for n, token in enumerate((9, HANGS, 14))]
    cut = completion(3, CUT)
    with opened(file, "row", reward_timeout_s=1000.0) as pool:
        scoring = scoring_of(pool, tmp_path, reports, lambda: bool(asked))
        scoring.take(made)
        assert until(
            lambda: pool.pending.answers[0] is not None and (tmp_path / f"row {HANGS}").exists(), scoring.pulse
        )
        asked.append(True)
        assert scoring.pulse()
        time.sleep(2 * pool_module.LOOK_S)  # a worker is free, and it is time to look
        scoring.take([cut])
        for _ in range(20):
            time.sleep(0.01)
            scoring.pulse()
        scored = scoring.finish([*made, cut])
        assert not any(supervisor.busy for supervisor in pool.supervisors)
        assert scored.scores[0].tolist() == [3.0] and np.isnan(scored.scores[[1, 3]]).all()
        assert not scored.faults.any() and not reports and not (tmp_path / f"row {CUT}").exists()
        asked.clear()
        again = scoring_of(pool, tmp_path, reports).finish(made[:1])  # and it can go on
        assert again.scores.tolist() == [[3.0]] and len(pool.supervisors) == 2


def test_supervisors_that_are_killed_meanwhile_cost_one_call_each(file, tmp_path):
    reports: list[str] = []
    made = [completion(n, token) for n, token in enumerate((HANGS, 9, 12, HANGS, 14, 15, 18, 19, 7))]
    with opened(file, "row", reward_timeout_s=1000.0) as pool:
        scoring = scoring_of(pool, tmp_path, reports)
        scoring.take(made)  # batches of three
        assert until(lambda: all(supervisor.busy for supervisor in pool.supervisors), scoring.pulse)
        killed = [supervisor.process for supervisor in pool.supervisors]
        for process in killed:
            process.kill()
        assert until(lambda: not pool.supervisors, scoring.pulse)
        scored = scoring.finish(made)
        assert len(pool.supervisors) == 2 and not any(supervisor.process in killed for supervisor in pool.supervisors)
    assert np.flatnonzero(scored.faults).tolist() == [0, 3] and scored.faults[0, 0] == FAILED
    assert scored.scores[[1, 2, 4, 5, 6, 7, 8], 0].tolist() == [3.0, 4.0, 14 / 3, 5.0, 6.0, 19 / 3, 7 / 3]
    assert len(reports) == 2 and all("ended from outside" in line for line in reports)


def test_a_round_that_is_not_collected_is_dropped(file, tmp_path):
    """As after a rollout that raised: its workers are ended, and its answers are not used."""
    with opened(file, "row", reward_timeout_s=20.0) as pool:
        lost = scoring_of(pool, tmp_path, [])
        lost.take([completion(0, HANGS), completion(1, 9), completion(2, 12)])
        assert until((tmp_path / f"row {HANGS}").exists, lost.pulse)
        scored = scoring_of(pool, tmp_path, []).finish([completion(n, token) for n, token in enumerate((12, 14, 15))])
    assert scored.scores[:, 0].tolist() == [4.0, 14 / 3, 5.0]


def test_a_supervisor_is_not_lost_while_the_trainer_does_not_read(file, tmp_path):
    """The trainer was busy for longer than a supervisor may be silent."""
    with opened(file, "row") as pool:
        scoring = scoring_of(pool, tmp_path, [])
        scoring.take([completion(0, 9)])
        assert until((tmp_path / "row 9").exists, lambda: None)
        pool.looked_at -= 10 * (pool.cfg.reward_timeout_s + pool_module.IMPORT_S + pool_module.GRACE_S)
        assert scoring.finish([completion(0, 9)]).scores.tolist() == [[3.0]]


def test_prompts_are_not_mixed_up_when_samples_come_and_go():
    """A prompt is sent once and identified by its objects; a new one may have the address of an old one."""
    packed = Packed()
    for n in range(50):
        packed.add([RewardInput(f"q{n}", "", [1], {"answer": str(n)})])
    assert len(packed.prompts) == 50


@pytest.mark.full
def test_a_supervisor_that_is_stopped_counts_as_lost(file, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "IMPORT_S", 0.0)
    monkeypatch.setattr(supervisor_handle, "GRACE_S", 0.5)
    reports: list[str] = []
    with opened(file, "row", reward_workers=1, reward_timeout_s=5.0) as pool:
        monkeypatch.setattr(pool_module, "GRACE_S", 0.5)
        keeper = pool.supervisors[0].process.pid
        inner = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        os.kill(inner, signal.SIGSTOP)
        scoring = scoring_of(pool, tmp_path, reports)
        scoring.take([completion(0, 9), completion(1, 12)])
        scored = scoring.finish([completion(0, 9), completion(1, 12)])
    assert scored.faults.tolist() == [[FAILED], [0.0]] and scored.scores[1].tolist() == [4.0]
    assert len(reports) == 1 and "ended from outside" in reports[0]
