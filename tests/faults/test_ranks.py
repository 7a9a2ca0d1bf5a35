"""Ranks without work, ranks that disagree, and the real launcher around them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.fault import FAULTS, Fault, as_json
from tests.faults.runs import STEPS, as_argv
from tests.faults.test_stops import phase_of
from tests.support.jobs import descendants, wait_for
from tests.support.launcher import PROJECT, environment

ONE_GROUP = """def score(completions, **columns):
    return [float(len(text)) if columns["answer"][0] == "5" else 1.0 for text in completions]
"""


def test_F31_a_rank_without_work(arena, record):
    """One micro-batch for two ranks, or none at all: as many collectives on both, in each step as in the first ones."""
    counting = [Fault("count collectives"), Fault("trace")]
    (arena.folder / "one_group.py").write_text(ONE_GROUP)
    rewards = {f"{arena.folder}/one_group.py:score": 1.0}
    idle = arena.run(rewards=rewards, micro_batch_tokens=512, save_steps=0, log_samples_steps=0)
    idle.finish(faults=counting)
    counts = [[line["collectives"] for line in idle.trace(rank)] for rank in (0, 1)]
    each = [
        {name: after[name] - before.get(name, 0) for name in after} for before, after in zip(counts[0], counts[0][1:])
    ]
    groups = [round((1 - row["reward/zero_std_groups"]) * 3) for row in idle.metrics()]
    good = counts[0] == counts[1] and len(counts[0]) == STEPS and {0, 1} <= set(groups)
    good = good and all(step == each[-1] for step in each[1:])
    record(
        "F31",
        STEPS,
        STEPS if good else 0,
        f"steps with 0 and 1 groups to train on: {groups.count(0)}, {groups.count(1)}; collectives in each: "
        f"{each[-1]} on both ranks" + ("" if good else f": {counts}"),
    )


def disagreements(arena):
    """Name -> (settings of rank 1, faults)."""
    edited = arena.folder / "row_changed.jsonl"
    edited.write_text((arena.folder / "questions.jsonl").read_text().replace("What is 1", "What was 1", 1))
    model = arena.folder / "model_changed"
    if not model.exists():
        shutil.copytree(arena.model, model)
        (model / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    return {
        "lr": (["--lr", "0.5"], []),
        "seed": (["--seed", "5"], []),
        "data": (["--data", str(edited)], []),
        "model": (["--model", str(model)], []),
        "versions": ([], [Fault("other versions", rank=1)]),
    }


@pytest.mark.parametrize(
    "names",
    [["lr"], pytest.param(["lr", "seed", "data", "model", "versions"], marks=pytest.mark.full)],
    ids=["sample", "all"],
)
def test_F32_ranks_that_disagree(arena, record, names):
    """Refused before the first step, on both ranks, with field and rank. Weights that part later: F33."""
    bad = []
    for name in names:
        extra, faults = disagreements(arena)[name]
        run = arena.run()
        job = run.launch(faults, argv_of={1: extra})
        wrong = run.ended_with(job, 2)
        named = re.search(rf"ranks disagree about {name}\w*: rank 1 differs from rank 0", job.text())
        if wrong or not named or "step: 1/" in job.text():
            bad.append((name, wrong, job.text()[-400:]))
    record("F32", len(names), len(names) - len(bad), f"0 steps; wrong: {bad}" if bad else "refused after 0 steps")


class Launched:
    """A run under the real launch/torchrun.py, with faults, in a process group of its own."""

    def __init__(self, run, faults=(), world=2, launcher=("--standalone",), **settings):
        argv = as_argv(run.settings | settings)
        command = [sys.executable, str(PROJECT / "launch" / "torchrun.py"), *launcher, f"--nproc_per_node={world}"]
        self.log = run.folder / "torchrun.log"
        self.process = subprocess.Popen(
            [*command, str(PROJECT / "tests" / "faults" / "rank.py"), *argv],
            cwd=PROJECT,
            start_new_session=True,
            env=environment() | {FAULTS: as_json(faults), "GRPO_FAULTS_OUT": str(run.seen)},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, timeout=120.0):
        """Its exit code and what all ranks said."""
        try:
            return self.process.wait(timeout), self.log.read_text(errors="replace")
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def below(self):
        """Its ranks and whatever they started."""
        return descendants(self.process.pid, set())


@pytest.mark.full
def test_F3_under_the_real_launcher(arena, record):
    """Rank 1 killed in an update: 137, the rank named, nobody left; the same command goes on to the same end."""
    run = arena.run()
    job = Launched(run, [Fault("kill9", "update", 1, 5)])
    code, output = job.wait()
    good = code == 128 + signal.SIGKILL and "rank 1 is gone, last in phase update, step 5" in output
    code, output = Launched(run, [Fault("record")]).wait()
    differences = [name for name in arena.same(run) if not name.startswith("rollouts")]
    record(
        "F3",
        1,
        int(good and code == 0 and not differences),
        "launch/torchrun.py: 137"
        + (f"; wrong: {code} {output[-500:]} {differences[:3]}" if not good or code or differences else ""),
    )


@pytest.mark.full
def test_F6_under_the_real_launcher(arena, record):
    """SIGTERM to launch/torchrun.py, as a scheduler sends it: saved, 75, continued to the same end."""
    run = arena.run()
    slow = [Fault("sleep", "reward", None, step, 0.3) for step in range(1, STEPS + 1)]
    job = Launched(run, slow)
    wait_for(lambda: phase_of(run, 1)[1] >= 5, timeout=90)
    began = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    code, output = job.wait()
    seconds = time.monotonic() - began
    saved = run.valid()
    good = code == 75 and seconds < 25 and saved[0] not in (3, 6, 9, 12)
    again, _ = Launched(run).wait()
    run.seen.joinpath("rollouts").mkdir(exist_ok=True)
    differences = [name for name in arena.same(run) if not name.startswith("rollouts")]
    record(
        "F6",
        1,
        int(good and again == 0 and not differences),
        f"launch/torchrun.py: {code} after {seconds:.1f} s, saved {saved}"
        + (f"; {differences[:3]} {output[-400:]}" if differences or not good else ""),
    )


@pytest.mark.full
def test_F35_torchrun_killed(arena, record):
    """SIGKILL of torchrun while rank 1 hangs: its ranks, and what they started, are gone within 5 s."""
    run = arena.run()
    job = Launched(run, [Fault("hang", "reward", 1, 5)])
    wait_for(lambda: phase_of(run, 1) == ("reward", 5), timeout=90)
    below = job.below()
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    began = time.monotonic()

    def left():
        return [pid for pid in below if Path(f"/proc/{pid}/stat").exists() and not zombie(pid)]

    while left() and time.monotonic() < began + 5:
        time.sleep(0.05)
    seconds, orphans = time.monotonic() - began, left()
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    run.finish()
    record(
        "F35",
        len(below),
        len(below) - len(orphans),
        f"{len(below)} processes gone after {seconds:.1f} s, orphans {len(orphans)}",
    )


def zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.full
def test_F34_four_runs_at_once(arena, record):
    """With the default port taken by another program, four runs on one machine all find one of their own."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 29500))
            holder.listen()
        except OSError:
            pass  # another program holds it already: as good
        jobs = [Launched(arena.run(world=1, max_steps=2), world=1) for _ in range(4)]
        codes = [job.wait(timeout=240)[0] for job in jobs]
    record("F34", 4, codes.count(0), f"exit codes {codes}")


@pytest.mark.full
def test_F34_a_port_that_is_busy(arena, record):
    """Asked for that very port, a run ends soon and says that it is taken."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        run = arena.run(max_steps=2)
        began = time.monotonic()
        launcher = ("--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={port}")
        code, output = Launched(run, launcher=launcher).wait(timeout=180)
    good = code not in (0, None) and "address already in use" in output.lower()
    record(
        "F34",
        1,
        int(good),
        f"busy port {port}: code {code} after {time.monotonic() - began:.0f} s"
        + ("" if good else f": {json.dumps(output[-400:])}"),
    )
