"""Killed at any instant, the same command goes on, and ends with the same bits."""

import random
import signal
import statistics
import time
from functools import partial

import pytest

from tests.faults.fault import Fault
from tests.support.jobs import wait_for

KINDS = ("plain", "iterated", "deterministic")
SAVE_PARTS = ("snapshot", "write", "written", "manifest", "rename", "committed", "prune")
OF_MAIN = ("manifest", "rename", "committed", "prune")  # parts of a save that rank 0 does alone


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.full)], ids=["sample", "all"])
def test_F1_whole_job_killed_at_a_random_instant(arena, record, kills):
    """Uniform over the life of a run, start-up and saves included. The control is F19: what "same" would miss."""
    rng = random.Random(kills)
    same, orphans, redone, restarts = 0, 0, [], []
    for number in range(kills):
        kind = KINDS[number % len(KINDS)] if kills > 3 else "plain"
        _, _, seconds = arena.reference(kind)
        run = arena.run(kind)
        job = run.launch()
        time.sleep(rng.uniform(0.0, seconds))
        job.kill()
        job.wait()
        orphans += len(arena.fork_server.orphans())
        redone.append(run.last_logged() - max([0, *(run.valid() if run.output.exists() else [])]))
        began = time.monotonic()
        run.finish()
        restarts.append(time.monotonic() - began)
        same += not arena.same(run, kind)
    steps = f"steps lost: median {statistics.median(redone)}, most {max(redone)}"
    record(
        "F1",
        kills,
        same if orphans == 0 else 0,
        f"{same}/{kills} bit-identical, orphans {orphans}, {steps}, restart to end {statistics.median(restarts):.1f} s",
    )


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_F1_under_zero(arena, record, stage):
    """The same for weights and optimizer state that DeepSpeed shards: killed in an update between two saves."""
    kind = f"zero-{stage}"
    run = arena.run(kind)
    run.launch([Fault("kill9", "update", None, 8)]).wait()
    back = run.valid()
    run.finish()
    differences = arena.same(run, kind)
    record(
        "F1", 1, int(back == [6, 3] and not differences), f"{kind}: bit-identical {not differences} {differences[:3]}"
    )


def killed_while_saving(arena, part, rank):
    """A run killed in that part of the save of step 6, on that rank. Returns what is wrong; empty when all is well."""
    run = arena.run(save_total_limit=1)
    job = run.launch([Fault("kill9", f"save/{part}", rank, 6)])
    codes = job.wait()
    if codes[rank] != -signal.SIGKILL:
        return [f"the fault never came: {codes}"]
    before = run.valid()
    wrong = [] if before and before[0] in (3, 6) else [f"valid before: {before}"]
    job = run.finish(settings={"save_steps": 5})  # other saves than before: nothing writes over what was left
    if not before or f"resuming from {run.output}/checkpoint_{before[0]}" not in job.text():
        wrong.append("resumed from elsewhere")
    return wrong + run.leftovers() + arena.same(run)


def all_save_kills():
    return [(part, rank) for part in SAVE_PARTS for rank in (0, 1) if rank == 0 or part not in OF_MAIN]


@pytest.mark.parametrize(
    "chosen",
    [random.Random(2).sample(all_save_kills(), 1), pytest.param(all_save_kills(), marks=pytest.mark.full)],
    ids=["sample", "all"],
)
def test_F2_killed_in_every_part_of_a_save(arena, record, chosen):
    wrong = {f"{part} on rank {rank}": killed_while_saving(arena, part, rank) for part, rank in chosen}
    bad = {name: found for name, found in wrong.items() if found}
    record("F2", len(wrong), len(wrong) - len(bad), f"wrong: {bad}" if bad else f"{', '.join(wrong)}: one valid, same")


ONE_RANK = [
    (kind, phase, rank)
    for kind in ("kill9", "raise")
    for phase in ("rollout", "reward", "exchange", "logprobs", "update")
    for rank in (0, 1)
]


@pytest.mark.parametrize(
    "chosen", [[("kill9", "update", 1)], pytest.param(ONE_RANK, marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F3_one_rank_fails(arena, record, chosen):
    """The job ends soon, names rank, phase and step, and continues to the same end."""
    num_held, seconds, bad = 0, [], []
    for kind, phase, rank in chosen:
        run = arena.run()
        job = run.launch([Fault(kind, phase, rank, 5)])
        wait_for(partial(job.ended, rank))
        failed = time.monotonic()
        codes = job.wait()
        seconds.append(time.monotonic() - failed)
        gone = f"rank {rank} is gone, last in phase {phase}, step 5"
        expected_line = (
            gone if kind == "kill9" else f"error: rank {rank}, phase {phase}, step 5: RuntimeError: out of luck"
        )
        expected = -signal.SIGKILL if kind == "kill9" else 1
        good = expected_line in job.text() and codes[rank] == expected and codes[1 - rank] not in (None, 0)
        run.finish()
        differences = arena.same(run)
        num_held += good and not differences
        if not good or differences:
            bad.append((kind, phase, rank, codes, expected_line in job.text(), differences[:3]))
    record(
        "F3",
        len(chosen),
        num_held,
        f"others end after {max(seconds):.1f} s at most" + (f"; wrong: {bad}" if bad else ""),
    )


@pytest.mark.full
def test_F38_curves_after_three_crashes(arena, record):
    """One point for each step on every curve, equal to the uninterrupted run's; the lost run's points are hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = arena.run()
    for step in (2, 5, 8):
        run.launch([Fault("kill9", "exchange", None, step)]).wait()
    run.finish()
    curves = []
    for of in (run, arena.reference()[0]):
        events = EventAccumulator(str(of.logs / "run"), size_guidance={"scalars": 0})
        events.Reload()
        curves.append(
            {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        )
    mine, whole = curves
    duplicates = sum(len(points) - len({step for step, _ in points}) for points in mine.values())
    checked = [tag for tag in whole if not tag.startswith(("time/", "idle/", "save/", "tokens_per_s", "hp"))]
    equal = [tag for tag in checked if mine.get(tag) == whole[tag]]
    unequal = sorted(set(checked) - set(equal))
    record(
        "F38",
        len(checked),
        len(equal) if duplicates == 0 else 0,
        f"{len(equal)} of {len(checked)} curves equal, duplicate steps {duplicates}"
        + (f", unequal {unequal}" if unequal else ""),
    )


@pytest.mark.full
def test_F42_forty_restarts(arena, record):
    """Segments of 3 steps, each continued by the next launch, end as one long run; disk, memory, files stay flat."""
    restarts, every = 40, [Fault("trace")]
    whole, run = (arena.run(max_steps=3 * restarts, save_total_limit=2) for _ in range(2))
    whole.finish(timeout=300)
    sizes = []
    for segment in range(restarts):
        run.settings["max_steps"] = 3 * (segment + 1)
        run.finish(faults=every)
        sizes.append(sum(path.stat().st_size for path in run.output.rglob("*") if path.is_file()))
    trace = [line for line in run.trace(0) if line["step"] % 3 == 0]
    early, late = trace[2], trace[-1]
    grown = late["rss_mb"] - early["rss_mb"]
    differences = run.ending().differences(whole.ending())
    good = not differences and late["files"] <= early["files"] and grown < 20 and sizes[-1] < 1.1 * sizes[2]
    record(
        "F42",
        restarts,
        restarts if good else 0,
        f"same as one run of {3 * restarts} steps: {not differences}; open files {early['files']} to "
        f"{late['files']}, memory {grown:+.1f} MB, disk {sizes[2]} to {sizes[-1]} bytes"
        + (f"; differences {differences[:3]}" if differences else ""),
    )
