"""A disk that refuses: training goes on, what was saved stays, no files are left over, and later all is the same."""

import errno
import re
import signal

import pytest
import torch

from tests.faults.fault import Fault
from tests.faults.runs import STEPS


def mounted(arena, run, size):
    """A file system of that size in the place of the run's output; skips where none can be mounted."""
    run.output.mkdir()
    try:
        return arena.fork_server.mount(run.output, size)
    except PermissionError as error:
        pytest.skip(str(error))


def checkpoint_bytes(run):
    """What a checkpoint takes on a disk of 4 KB pages."""
    folder = run.output / f"checkpoint_{STEPS}"
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_F10_disk_full_while_saving(arena, record):
    """Room for one checkpoint and a half: the second save fails, training goes on, code 2; with room, the same end.

    The save sees it before it writes; what the kernel refuses in the middle of a file is F11.
    """
    whole, ending, _ = arena.reference()
    weights = (arena.model / "model.safetensors").stat().st_size
    size = checkpoint_bytes(whole) + 2 * weights
    run = arena.run()
    mount_point = run.output
    run.output = mounted(arena, run, str(size))
    job = run.launch()
    wrong = run.ended_with(job, 2)
    output = job.text()
    warned = re.search(rf"{mount_point}/checkpoint_6 could not be written: .*needed, .*free", output)
    wrong += [] if warned else [f"no warning: {output[-500:]}"]
    wrong += [] if run.last_logged() == STEPS else [f"training ended at step {run.last_logged()}"]
    wrong += [] if run.valid() == [3] else [f"valid: {run.valid()}"]
    left = {path.name for path in run.output.iterdir() if path.is_dir() and path.name != ".ranks"}
    wrong += [] if left == {"checkpoint_3"} else [f"left over: {left}"]
    arena.fork_server.mount(mount_point, "64m")
    run.finish()
    wrong += run.ending().differences(ending)
    record("F10", 1, int(not wrong), f"{wrong or 'warned, trained on, kept the first; with room the same end'}")


def small_files(rank: int) -> list[Fault]:
    """From step 6 to 9; the saves of steps 3 and 6 have time to end before."""
    limit = [Fault("file size", "rollout", rank, 6, 60_000), Fault("file size", "rollout", rank, 9, 0)]
    return [*limit, *(Fault("sleep", "reward", rank, step, 1.5) for step in (5, 8))]


SAVES = {
    "EIO in tensors, rank 0": [Fault("tensor file error", rank=0, step=6, value=errno.EIO)],
    "EIO in tensors, rank 1": [Fault("tensor file error", rank=1, step=6, value=errno.EIO)],
    "ENOSPC in tensors, rank 1": [Fault("tensor file error", rank=1, step=6, value=errno.ENOSPC)],
    "EIO in fsync": [Fault("sync error", step=6, value=errno.EIO)],
    **{f"EFBIG, rank {rank}": small_files(rank) for rank in (0, 1)},
}


@pytest.mark.parametrize(
    "chosen", [["EIO in tensors, rank 1"], pytest.param(list(SAVES), marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F11_a_save_that_fails_once(arena, record, chosen):
    """The save of step 6 fails on one rank: all give it up, say so, train on to the same end; the next save holds."""
    bad = {}
    for name in chosen:
        run = arena.run()
        job = run.launch(SAVES[name])
        codes = job.wait()
        wrong = [] if set(codes) == {0} else [f"codes {codes}: {job.text()[-500:]}"]
        wrong += [] if run.valid() == [12, 9, 3] else [f"valid: {run.valid()}"]
        wrong += [] if f"{run.output}/checkpoint_6" in job.text() else ["no warning"]
        wrong += run.leftovers() + ([] if wrong else arena.same(run))
        if wrong:
            bad[name] = wrong
    record("F11", len(chosen), len(chosen) - len(bad), f"wrong: {bad}" if bad else ", ".join(chosen))


@pytest.mark.full
def test_F11_a_disk_that_turns_read_only(arena, record):
    """EROFS on all ranks from the second save on: the first checkpoint stays, code 2; writable again, the same end."""
    run = arena.run()
    mount_point = run.output
    run.output = mounted(arena, run, "64m")
    run.settings["max_steps"] = 3
    run.finish()
    run.settings["max_steps"] = STEPS
    arena.fork_server.mount(mount_point, "64m", read_only=True)
    job = run.launch()
    codes = job.wait()  # exit.json cannot be written either
    good = 2 in codes and set(codes) <= {2, -signal.SIGTERM} and "Traceback" not in job.text()
    wrong = [] if good else [f"codes {codes}: {job.text()[-500:]}"]
    wrong += [] if run.valid() == [3] else [f"valid: {run.valid()}"]
    arena.fork_server.mount(mount_point, "64m")
    run.finish()
    wrong += arena.same(run)
    record("F11", 1, int(not wrong), f"read-only: {wrong or 'refused with code 2, then the same end'}")


@pytest.mark.parametrize(
    "how", ["deleted", pytest.param("full", marks=pytest.mark.full), pytest.param("read-only", marks=pytest.mark.full)]
)
def test_F37_the_folder_of_curves(arena, record, how):
    """Deleted while training, or full: training does not depend on it. Read-only at the start: refused, by name."""
    run = arena.run()
    faults = [Fault("remove runs", "reward", 0, 5)] if how == "deleted" else []
    if how != "deleted":
        run.logs.mkdir()
        try:
            arena.fork_server.mount(run.logs, "16k", read_only=how == "read-only")
        except PermissionError as error:
            pytest.skip(str(error))
    job = run.launch(faults)
    if how == "read-only":
        wrong = run.ended_with(job, 2)
        wrong += [] if f"runs_dir: {run.logs}/run cannot be written" in job.text() else ["no warning"]
    else:
        codes = job.wait()
        wrong = [] if set(codes) == {0} and run.valid()[:1] == [STEPS] else [f"{codes}: {job.text()[-600:]}"]
        whole, _, _ = arena.reference()
        wrong += [] if wrong or torch.equal(run.weights(), whole.weights()) else ["other weights"]
        warned = [line for line in job.text().splitlines() if line.startswith("warning")]
        files = 5  # curves, lines, train.log, and a file of rollouts on each rank
        once = 1 <= len(warned) == len(set(warned)) <= files
        wrong += [] if once and "Traceback" not in job.text() else [f"not one warning for each file: {warned}"]
    record("F37", 1, int(not wrong), f"{how}: {wrong or 'as promised'}")
