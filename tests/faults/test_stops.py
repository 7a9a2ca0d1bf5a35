"""Asked to stop, or standing still: the run ends soon, with the code that says why, and continues to the same end."""

import json
import random
import signal
import time
from functools import partial

import pytest

from tests.faults.fault import Fault
from tests.faults.runs import STEPS
from tests.support.jobs import wait_for
from tests.support.tiers import short

PHASES = ("rollout", "reward", "exchange", "logprobs", "update")
TIMEOUT_S = 3.0
STALLED, PREEMPTED = 74, 75
SLOW_REWARD = """import time
from pathlib import Path


def score(completions, **columns):
    if Path({flag!r}).exists():
        time.sleep(60)
    return [sum(map(ord, text)) % 11 / 11 + len(text) / 50 for text in completions]
"""


def phase_of(run, rank):
    """Where a rank's heartbeat says it is: (phase, step)."""
    try:
        beat = json.loads((run.output / ".ranks" / f"rank_{rank}.json").read_text())
        return beat["phase"], beat["step"]
    except (OSError, ValueError):
        return "", 0


def is_at(run, rank, phase, step):
    return phase_of(run, rank) == (phase, step)


STILL = [(kind, phase, rank) for kind in ("stop", "hang") for phase in PHASES for rank in (0, 1)]


@pytest.mark.parametrize(
    "chosen", [[("stop", "rollout", 1)], pytest.param(STILL, marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F4_a_rank_that_stands_still(arena, record, chosen):
    """SIGSTOP or an endless sleep: all that can end with 74, the rank is named, stacks are shown, then it continues."""
    late, bad = [], []
    for kind, phase, rank in chosen:
        run = arena.run(stall_timeout_s=TIMEOUT_S)
        job = run.launch([Fault(kind, phase, rank, 5)], kill_after_s=5.0)
        wait_for(partial(is_at, run, rank, phase, 5))
        still = time.monotonic()
        codes = job.wait(timeout=TIMEOUT_S + 30)
        late.append(time.monotonic() - still - TIMEOUT_S)
        wrong = [] if codes[1 - rank] == STALLED else [f"codes {codes}"]
        wrong += [] if codes[rank] == (-signal.SIGKILL if kind == "stop" else STALLED) else [f"codes {codes}"]
        named = f"STALL rank={rank} phase={phase} step=5 " in job.text()
        wrong += [] if named else [f"not named: {job.text()[-800:]}"]
        wrong += [] if 'File "' in job.text() and "in train" in job.text() else ["no stacks"]
        wrong += [] if run.exit_note()["code"] == STALLED else [f"exit.json: {run.exit_note()}"]
        run.finish()
        wrong += arena.same(run)
        if wrong:
            bad.append((kind, phase, rank, wrong))
    record(
        "F4",
        len(chosen),
        len(chosen) - len(bad),
        f"{TIMEOUT_S:.0f} s allowed, noticed and ended {max(late):.1f} s after that at most"
        + (f"; wrong: {bad}" if bad else ""),
    )


@pytest.mark.parametrize("slow", [3, pytest.param(STEPS, marks=pytest.mark.full)], ids=["sample", "all"])
def test_F5_a_slow_rank_is_no_stall(arena, record, slow):
    """Rank 1 takes half the allowed time for a phase of each step: nobody cries stall, and the end is the same."""
    run = arena.run(stall_timeout_s=2.0)
    faults = [Fault("sleep", "reward", 1, step, 1.0) for step in range(1, slow + 1)]
    job = run.finish(faults=faults)
    wrong = (["false alarm"] if "STALL" in job.text() else []) + arena.same(run)
    record("F5", len(faults), 0 if wrong else len(faults), f"{len(faults)} slow steps, wrong: {wrong or 'nothing'}")


ASKED = [
    (kind, phase, rank, step) for kind, step in (("term", 5), ("int", 8)) for phase in PHASES for rank in (None, 0, 1)
]


def stopped(arena, kind, phase, rank, step):
    """A run that gets a signal in that place. Returns (seconds to the end, what is wrong)."""
    run = arena.run()
    job = run.launch([Fault(kind, phase, rank, step)])
    wait_for(lambda: phase_of(run, rank or 0)[1] >= step or not job.running())
    began = time.monotonic()
    wrong = run.ended_with(job, PREEMPTED)
    seconds = time.monotonic() - began
    saved = run.valid()
    wrong += [] if saved and saved[0] in (step - 1, step) else [f"saved {saved}"]
    wrong += run.leftovers()
    job = run.finish()
    wrong += [] if f"resuming from {run.output}/checkpoint_{saved[0] if saved else 0}" in job.text() else ["resume"]
    return seconds, wrong + arena.same(run)


@pytest.mark.parametrize(
    "chosen", [random.Random(6).sample(ASKED, 1), pytest.param(ASKED, marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F6_asked_to_stop_in_each_phase(arena, record, chosen):
    """SIGTERM or SIGINT, to all ranks or one: saved where it stands, code 75, and continued to the same end."""
    outcomes = {place: stopped(arena, *place) for place in chosen}
    bad = {place: wrong for place, (_, wrong) in outcomes.items() if wrong}
    slowest = max(seconds for seconds, _ in outcomes.values())
    record(
        "F6",
        len(chosen),
        len(chosen) - len(bad),
        f"saved and ended within {slowest:.1f} s" + (f"; {bad}" if bad else ""),
    )


def test_F6_before_the_first_step(arena, record):
    """While it starts there is nothing to save: code 75 at once, and the next launch runs from the beginning."""
    run = arena.run()
    job = run.launch([Fault("sleep", "start", None, None, 60.0)])
    wait_for(lambda: all(phase_of(run, rank)[0] == "start" for rank in (0, 1)) or not job.running())
    began = time.monotonic()
    job.kill(signal.SIGTERM)
    wrong = run.ended_with(job, PREEMPTED)
    seconds = time.monotonic() - began
    wrong += [] if not run.valid() and seconds < 5 else [f"after {seconds:.1f} s, saved {run.valid()}"]
    run.finish()
    wrong += arena.same(run)
    record("F6", 1, int(not wrong), f"before the first step: {seconds:.1f} s" + (f"; {wrong}" if wrong else ""))


def test_F7_asked_to_stop_during_a_long_reward(arena, record):
    """The reward sleeps for a minute; the run does not wait for it, and scores the same completions again later."""
    flag = arena.folder / "slow"
    (arena.folder / "slow_reward.py").write_text(SLOW_REWARD.format(flag=str(flag)))
    run = arena.run(rewards={f"{arena.folder}/slow_reward.py:score": 1.0}, reward_timeout_s=120)
    job = run.launch([Fault("sleep", "rollout", None, 4, 5.0)])  # steps are shorter than a look at the heartbeat
    wait_for(lambda: phase_of(run, 0)[1] >= 4)
    flag.touch()
    wait_for(lambda: all(phase_of(run, rank)[0] in ("reward", "exchange") for rank in (0, 1)))
    time.sleep(0.5)
    began = time.monotonic()
    job.kill(signal.SIGTERM)
    wrong = run.ended_with(job, PREEMPTED)
    seconds = time.monotonic() - began
    flag.unlink()
    wrong += [] if seconds < 25 else [f"after {seconds:.1f} s"]
    wrong += [f"left: {left}"] if (left := arena.fork_server.orphans()) else []
    run.finish()
    wrong += arena.same(run)  # the other reward file has the same scores
    record("F7", 1, int(not wrong), f"saved and ended after {seconds:.1f} s" + (f"; wrong: {wrong}" if wrong else ""))


@pytest.mark.parametrize("number", short([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM]))
def test_F8_a_second_signal(arena, record, number):
    """A rank that hangs cannot stop in good order; the second signal ends it at once, and what was saved is intact."""
    run = arena.run()
    job = run.launch([Fault("hang", "update", None, 5)])
    wait_for(lambda: all(phase_of(run, rank) == ("update", 5) for rank in (0, 1)))
    job.kill(number)
    time.sleep(1.3)
    still = job.codes() == [None, None]
    began = time.monotonic()
    job.kill(number)
    codes = job.wait()
    seconds = time.monotonic() - began
    wrong = [] if still and set(codes) == {128 + number} and seconds < 2 else [f"{still} {codes} {seconds:.1f} s"]
    wrong += [] if run.valid() == [3] else [f"valid {run.valid()}"]
    run.finish()
    wrong += arena.same(run)
    record("F8", 1, int(not wrong), f"{number.name}: {seconds:.1f} s" + (f"; wrong: {wrong}" if wrong else ""))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_F9_one_rank_is_asked(arena, record, rank):
    """From outside, at a random instant of training: both ranks end at the same step, saved, with code 75."""
    run = arena.run(max_steps=60, save_steps=0)
    job = run.launch([Fault("trace")])
    wait_for(lambda: phase_of(run, rank)[1] >= 4)
    time.sleep(random.Random(rank).uniform(0.0, 0.3))
    job.kill(signal.SIGTERM, rank)
    wrong = run.ended_with(job, PREEMPTED)
    last = [run.trace(each_rank)[-1]["step"] for each_rank in (0, 1)]
    saved = run.valid()
    good = not wrong and last[0] == last[1] and len(saved) == 1 and saved[0] in (last[0] - 1, last[0])
    record("F9", 1, int(good), f"rank {rank} asked: last steps {last}, saved {saved}" + (f"; {wrong}" if wrong else ""))
