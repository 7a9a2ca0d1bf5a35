"""Starting the real scripts, and small jobs on several ranks, the way a user does: torchrun in a subprocess."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.jobs import PROJECT, environment, fork_server


def run_script(script: str, *args: str, nproc: int | None = None, cwd: Path = PROJECT, timeout: float = 300):
    """Run a script of the project, under torchrun when nproc is given. Returns the finished process."""
    torchrun = [] if nproc is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *torchrun, str(PROJECT / script), *args]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)


def fork_script(program: str, *args: str, nproc: int | None = None, cwd: Path = PROJECT, timeout: float = 300):
    """As `run_script`, forked from a process that has imported everything: a second instead of up to ten.

    A module's name will do as well. The ranks get torchrun's environment when nproc is given. Their outputs come one
    after the other, and the code is that of the first rank that failed. Launchers have tests that start them.
    """
    world = 1 if nproc is None else nproc
    file = str(PROJECT / program) if program.endswith(".py") else program
    job = fork_server().launch(file, args, world, torchrun=nproc is not None, cwd=cwd)
    code = next(filter(None, job.wait(timeout)), 0)
    out, err = ("".join(job.text(rank, stream) for rank in range(world)) for stream in ("out", "err"))
    return subprocess.CompletedProcess([file, *args], code, out, err)


def patched_train(folder: Path, patch: str) -> str:
    """A train.py that first runs `patch` in every rank: where a test breaks something on purpose. Returns its path."""
    start = folder / "start.py"
    start.write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n{patch}\n"
        "import train\nfrom grpo.config.command_line import load_config\nfrom grpo.run.main import run_main\n"
        "sys.exit(run_main(train.train, load_config, sys.argv[1:]))\n"
    )
    return str(start)


def run_ranks(jobs: list[tuple[str, dict]], nproc: int, out: Path, timeout: float = 300) -> list[list]:
    """Run jobs of `tests/support/rank_jobs.py` on `nproc` ranks in one launch. Returns results[rank][job]."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = fork_script("tests/support/rank_jobs.py", str(out), nproc=nproc, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(nproc)]


def metrics_of(runs_dir: Path) -> list[dict[str, float]]:
    """The JSON lines of the one run under a runs folder."""
    [file] = runs_dir.glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]
