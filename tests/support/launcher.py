"""Starting the real scripts, and small jobs on several ranks, the way a user does: torchrun in a subprocess."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def environment() -> dict[str, str]:
    """This environment without another launcher's ranks in it."""
    ours = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}}
    return {**ours, **QUIET, "PYTHONPATH": str(PROJECT)}


def run_script(script: str, *args: str, nproc: int | None = None, cwd: Path = PROJECT, timeout: float = 300):
    """Run a script of the project, under torchrun when nproc is given. Returns the finished process."""
    torchrun = [] if nproc is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *torchrun, str(PROJECT / script), *args]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)


def patched_train(folder: Path, patch: str) -> str:
    """A train.py that first runs `patch` in every rank: where a test breaks something on purpose. Returns its path."""
    start = folder / "start.py"
    start.write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n{patch}\n"
        "import train\nfrom grpo.config.command_line import load_config\nfrom grpo.run.launch import run_main\n"
        "sys.exit(run_main(train.train, load_config, sys.argv[1:]))\n"
    )
    return str(start)


def run_ranks(jobs: list[tuple[str, dict]], nproc: int, out: Path, timeout: float = 300) -> list[list]:
    """Run jobs of `tests/support/rank_jobs.py` on `nproc` ranks in one launch. Returns results[rank][job]."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = run_script("tests/support/rank_jobs.py", str(out), nproc=nproc, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(nproc)]


def metrics_of(runs_dir: Path) -> list[dict[str, float]]:
    """The JSON lines of the one run under a runs folder."""
    [file] = runs_dir.glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]
