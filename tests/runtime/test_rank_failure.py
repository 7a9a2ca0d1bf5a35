"""When a rank fails the whole job ends soon, says which rank, phase and step, and leaves nobody behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from grpo.errors import UserError
from grpo.runtime.startup import OutputLock
from tests.support.launcher import PROJECT, environment, fork_script, patched_train, run_script

FAST = ("--eval_data", "null", "--max_generate_length", "8", "--save_steps", "0")
SABOTAGE = """
import os, signal, time
from grpo.training.policy import Policy

plain = Policy.annotate

def annotate(self, batches):
    if self.counters.step == 2 and self.world.rank == 1:
        {act}
    return plain(self, batches)

Policy.annotate = annotate
"""


def sabotage(tmp_path, act):
    """The script and its settings."""
    script = patched_train(tmp_path, SABOTAGE.format(act=act))
    return script, "--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), *FAST


def processes_of(folder):
    """Processes whose command line names a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if str(folder).encode() in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "start, act, said",
    [
        (fork_script, "raise RuntimeError('out of luck')", "rank 1, phase logprobs, step 3: RuntimeError: out of luck"),
        (run_script, "os.kill(os.getpid(), signal.SIGKILL)", "rank 1 is gone, last in phase logprobs, step 3"),
    ],
    ids=["raises", "killed"],
)
def test_a_failing_rank_ends_the_job_with_its_name(tmp_path, start, act, said):
    began = time.monotonic()
    done = start(*sabotage(tmp_path, act), nproc=2, timeout=120)
    assert done.returncode != 0 and f"error: {said}" in done.stderr
    if "raise" in act:  # rank 0 fails after it, and does not write over it
        note = json.loads((tmp_path / "output" / "exit.json").read_text())
        assert note["code"] == 1 and note["reason"].startswith(said)
    assert processes_of(tmp_path) == []
    assert time.monotonic() - began < 90, "start-up included; the promise is 60 s from the failure"


def start_training(tmp_path, act="time.sleep(600)"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += sabotage(tmp_path, act)
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(condition, timeout=90.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def test_workers_die_with_their_launcher_and_let_go_of_the_folder(tmp_path):
    """torchrun killed with -9 while rank 1 hangs: no orphan writes on, and the lock is free again."""
    job = start_training(tmp_path)
    heartbeat = tmp_path / "output" / ".ranks" / "rank_1.json"
    wait_for(lambda: heartbeat.exists() and json.loads(heartbeat.read_text() or "{}").get("step") == 3)
    with pytest.raises(UserError, match="in use by another run"):
        OutputLock(tmp_path / "output", lambda line: None, wait_s=0.3)
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_for(lambda: processes_of(tmp_path) == [], timeout=5.0)
    OutputLock(tmp_path / "output", lambda line: None, wait_s=0.3)


def test_a_relaunch_waits_for_a_dying_predecessor(tmp_path):
    """The holder lets go after a second: the next one says that it waits, and then has the folder."""
    code = "import sys, time; from pathlib import Path; from grpo.runtime.startup import OutputLock\n"
    code += "lock = OutputLock(Path(sys.argv[1]), print); print('held', flush=True); time.sleep(1.5)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []
    OutputLock(tmp_path, said.append, wait_s=20)
    assert holder.wait() == 0 and len(said) == 1 and str(holder.pid) in said[0]


def test_ranks_that_mean_different_runs_are_refused(tmp_path):
    """Rank 1 gets another learning rate: both stop before training, the setting and the rank are named."""
    script = patched_train(tmp_path, "import os\nif os.environ['RANK'] == '1':\n    sys.argv += ['--lr', '0.5']")
    settings = ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), *FAST)
    done = fork_script(script, *settings, nproc=2, timeout=120)
    assert done.returncode != 0 and "ranks disagree about lr: rank 1 differs from rank 0" in done.stderr
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 2


def test_rank_0_has_time_to_say_why_all_ranks_end(tmp_path):
    """torchrun stops it as soon as another one has ended; here its line comes late."""
    patch = """
import os, time
import grpo.run.main
plain = grpo.run.main.warn
def late(line):
    time.sleep(5)
    plain(line)
if os.environ["RANK"] == "1":
    sys.argv += ["--lr", "0.5"]
else:
    grpo.run.main.warn = late
"""
    settings = ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), *FAST)
    done = run_script(patched_train(tmp_path, patch), *settings, nproc=2, timeout=120)
    assert "error: ranks disagree about lr" in done.stderr, done.stderr[-3000:]
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 2


@pytest.mark.parametrize(
    "place, nproc",
    [("grpo.run.run.Run.identify", None), ("grpo.run.run.Run.finish", None), ("grpo.run.run.Run.identify", 2)],
    ids=["before training", "after training", "two ranks"],
)
def test_a_bug_anywhere_is_in_exit_json(tmp_path, place, nproc):
    """Code 1 as for a bug in a step, also where no heartbeat and no training has begun; on the rank that met it."""
    owner, _, name = place.rpartition(".")
    module, _, cls = owner.rpartition(".")
    patch = f"""
import os
from {module} import {cls}
plain = {cls}.{name}
def broken(self, *args, **more):
    if self.world.rank == self.world.size - 1:
        return [][7]
    return plain(self, *args, **more)
{cls}.{name} = broken
"""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "exit.json").write_text('{"code": 74, "reason": "of an earlier run"}')
    settings = ("--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), *FAST)
    more = ("--max_steps", "1", "--num_threads", "1")
    done = fork_script(patched_train(tmp_path, patch), *settings, *more, nproc=nproc, timeout=120)
    assert done.returncode in ((1,) if nproc is None else (1, 143)) and "IndexError" in done.stderr  # 143: stopped
    note = json.loads((tmp_path / "output" / "exit.json").read_text())
    assert note == {"code": 1, "reason": f"rank {(nproc or 1) - 1}: IndexError: list index out of range"}
