"""Resuming: exact where it is promised, refused where it would not be, and the controls that show what "exact" sees."""

import json
import shutil
from typing import Any

import pytest

from tests.faults.fault import Fault
from tests.faults.runs import STEPS, flat
from tests.support.tiny import save_tiny

ZERO3 = {"backend": "deepspeed", "zero_stage": 3}
CHAINS = {
    "ddp x2, single": [(2, {}), (1, {"backend": "single"})],
    "single, ddp x3": [(1, {"backend": "single"}), (3, {})],
    "ddp x2, zero-3 x3, single": [(2, {}), (3, ZERO3), (1, {"backend": "single"})],
    "zero-1 x2, ddp x1, zero-2 x2": [(2, ZERO3 | {"zero_stage": 1}), (1, {}), (2, ZERO3 | {"zero_stage": 2})],
}
INJECTED = [Fault("injected rollouts")]


@pytest.fixture(scope="module")
def alone(arena):
    """The uninterrupted run on injected rollouts, single."""
    run = arena.run(world=1, backend="single")
    run.finish(faults=INJECTED)
    return run


def continued(arena, chain, broken=()):
    """A run on injected rollouts, killed between the parts of a chain of (ranks, settings)."""
    run = arena.run()
    for number, (world, settings) in enumerate(chain):
        last = number + 1 == len(chain)
        killed = [] if last else [Fault("kill9", "exchange", None, STEPS * (number + 1) // len(chain) + 1)]
        faults = [*INJECTED, *killed, *(broken if number else [])]
        job = run.launch(faults, world=world, settings=settings)
        codes = job.wait(timeout=200)
        assert set(codes) == {0} if last else -9 in codes, f"{codes}\n{job.text()[-3000:]}"
    return run


def distance(arena, one, other):
    """How far two ends are apart, as a share of the way travelled."""
    start = flat(arena.model)
    return float((one.weights() - other.weights()).norm() / (one.weights() - start).norm())


@pytest.mark.parametrize(
    "chain", ["ddp x2, single", *(pytest.param(name, marks=pytest.mark.full) for name in list(CHAINS)[1:])]
)
def test_F16_another_number_of_ranks_and_another_backend(arena, alone, record, chain):
    """The same questions in the same order, and on injected rollouts the same way. Control: moments lost."""
    run = continued(arena, CHAINS[chain])
    control = continued(arena, CHAINS[chain], [Fault("lose moments")])
    apart, lost = distance(arena, alone, run), distance(arena, alone, control)
    order = run.prompts() == alone.prompts()
    good = order and apart < 1e-3 and lost > 1e-2
    record("F16", 1, int(good), f"{chain}: distance {apart:.1e} (moments lost: {lost:.2f}), same order: {order}")


def other_model(arena):
    return {"model": save_tiny(arena.folder / "other_model", seed=3, spread=2.0)}


def other_data(arena):
    file = arena.folder / "other.jsonl"
    file.write_text((arena.folder / "questions.jsonl").read_text().replace("What is 1", "What was 1"))
    return {"data": file}


def same_path_other_data(arena):
    return {"data": arena.folder / "edited.jsonl"}


def other_reward(arena):
    file = arena.folder / "other" / "reward.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text((arena.folder / "reward.py").read_text().replace("% 11", "% 13"))
    return {"rewards": {f"{file}:score": 1.0}}


REFUSED = {
    "lr": {"lr": 2e-3},
    "num_generations": {"num_generations": 2},
    "batch_size": {"batch_size": 2},
    "seed": {"seed": 7},
    "temperature": {"temperature": 0.9},
    "beta": {"beta": 0.1},
    "weighting": {"weighting": "dapo"},
    "prompt_template": {"prompt_template": "Q: {question}"},
    "deterministic": {"deterministic": True},
    "model": other_model,
    "data": other_data,
    "rewards": other_reward,
}
ALLOWED = {
    "save_steps": {"save_steps": 2},
    "micro_batch_tokens": {"micro_batch_tokens": 512},
    "rollout_chunk_rows": {"rollout_chunk_rows": 12},
    "max_steps": {"max_steps": 5},
    "report_to": {"report_to": "none"},
    "save_total_limit": {"save_total_limit": 1},
}


@pytest.fixture(scope="module")
def three_steps(arena):
    """A finished run of three steps; `again` copies its output, so that each try meets the same."""
    run = arena.run(world=1, max_steps=3)
    run.finish()
    return run


def changed(arena, name):
    change: Any = REFUSED.get(name) or ALLOWED[name]
    return change(arena) if callable(change) else change


def again(arena, before, **changes):
    run = arena.run(world=1, **{"max_steps": 3, **changes})
    shutil.copytree(before.output, run.output)
    return run


@pytest.mark.parametrize(
    "names",
    [["data", "save_steps"], pytest.param([*REFUSED, *ALLOWED], marks=pytest.mark.full)],
    ids=["sample", "all"],
)
def test_F17_changed_settings(arena, three_steps, record, names):
    """What would change the training is refused and named, with code 2; the rest goes on."""
    bad = []
    for name in names:
        job = again(arena, three_steps, **changed(arena, name)).launch()
        (code,) = job.wait()
        named = "was trained with other settings" in job.text() and name in job.text()
        if (code, named) != ((2, True) if name in REFUSED else (0, False)):
            bad.append((name, code, job.text()[-300:]))
    record("F17", len(names), len(names) - len(bad), f"wrong: {bad}" if bad else ", ".join(names))


def test_F17_the_data_changed_under_its_name(arena, record):
    """The same command, the file edited in between: the fingerprint sees what the path does not."""
    file = arena.folder / "edited.jsonl"
    shutil.copy(arena.folder / "questions.jsonl", file)
    run = arena.run(world=1, data=file, max_steps=3)
    run.finish()
    run.settings["max_steps"] = 6
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    job = run.launch()
    codes = job.wait()
    good = codes == [2] and "data has changed" in job.text()
    record("F17", 1, int(good), "rows swapped under the same name" + ("" if good else f": {codes} {job.text()[-300:]}"))


def test_F18_finished_twice_from_nothing(arena, three_steps, record):
    """A finished run says so and changes nothing; must without a checkpoint is refused; never sets the old aside."""
    run = again(arena, three_steps)
    before = {path: path.stat().st_mtime_ns for path in run.output.glob("checkpoint_*/**/*")}
    results = {}
    for name in ("finished", "twice"):
        job = run.finish()
        results[name] = "nothing to do" in job.text()
    results["untouched"] = before == {path: path.stat().st_mtime_ns for path in run.output.glob("checkpoint_*/**/*")}
    must = arena.run(world=1, resume="must").launch()
    results["must, nothing there"] = must.wait() == [2] and "holds no valid checkpoint" in must.text()
    never = again(arena, three_steps, resume="never")
    output = never.finish().text()
    results["never"] = "resuming" not in output and (never.output / "previous" / "checkpoint_3").is_dir()
    bad = [name for name, good in results.items() if not good]
    record("F18", len(results), len(results) - len(bad), f"wrong: {bad}" if bad else ", ".join(results))


LOSSES = {
    "moments": "plain",
    "schedule": "linear",
    "step": "plain",
    "cursor": "plain",
    "trust": "iterated",
    "nothing": "iterated",
}


@pytest.fixture(scope="module")
def halves(arena):
    """halves(kind): a run of that kind that was killed in step 8, and can be continued from step 6."""
    found = {}

    def of_kind(kind):
        if kind not in found:
            run = arena.run(kind)
            run.launch([Fault("kill9", "exchange", None, 8)]).wait()
            assert run.valid() == [6, 3]
            found[kind] = run
        return found[kind]

    return of_kind


def copy_of(arena, run, kind):
    other = arena.run(kind)
    for name in ("output", "runs", "seen"):
        shutil.copytree(run.folder / name, other.folder / name, dirs_exist_ok=True)
    return other


@pytest.mark.parametrize("lost", ["moments", *(pytest.param(name, marks=pytest.mark.full) for name in [*LOSSES][1:])])
def test_F19_a_resume_that_forgets_is_seen(arena, halves, record, lost):
    """What was dropped at load shows in the comparison that says "same"; with "nothing" dropped it says "same"."""
    kind = LOSSES[lost]
    broken = copy_of(arena, halves(kind), kind)
    shutil.rmtree(broken.seen / "rollouts")  # of the lost steps too: the broken run may ask something else
    job = broken.launch([Fault(f"lose {lost}")])
    codes = job.wait()
    assert set(codes) == {0}, job.text()[-2000:]
    differences = [name for name in arena.same(broken, kind) if not name.startswith("rollouts step_")]
    weights = [name for name in differences if name.startswith("weights")]
    good = bool(weights) if lost != "nothing" else not differences
    record("F19", 1, int(good), f"{lost} lost: {len(weights)} tensors differ")


@pytest.mark.full
def test_F36_the_clock_turned_back(arena, record):
    """An hour back and another time zone at step 5: the same end, no negative seconds, curves in order."""
    run = arena.run()
    run.finish(faults=[Fault("clock", "reward", None, 5)])
    negative = [key for row in run.metrics() for key, value in row.items() if key.startswith("time/") and value < 0]
    differences = arena.same(run)
    steps = [row["step"] for row in run.metrics()]
    good = not negative and not differences and steps == sorted(steps)
    record("F36", 1, int(good), "same end" if good else f"{negative[:3]} {differences[:3]} {json.dumps(steps)}")
