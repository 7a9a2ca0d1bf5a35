"""Two ranks against one, and dealt chunks against fixed ones, on a workload that is skewed on purpose.

    python benchmarks/two_ranks.py [--pairs 5] [--only speed_up]

speed-up   the demo with one thread a process: seconds of one process over seconds of two, for the rollout and for
           the micro-batches of the update. Runs alternate; medians, lowest and highest in brackets. The control is
           the machine's own ceiling: two single-process runs at once, which share nothing but the machine, against
           one alone. That is the speed-up of two ranks that never wait for each other.
balance    questions alternate between working the problem out (some 40 tokens) and being asked for the number alone
           (3 tokens), in file order, so that fixed turns give one rank all the long ones. Idle share: how much of
           the ranks' rollout time goes into waiting. The control deals chunks in fixed turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "micro_batches", "step")
START = f"""
import os, sys
sys.path.insert(0, {str(PROJECT)!r})
import numpy as np
import grpo.data.questions, grpo.runtime.distributed, train
from grpo.config.command_line import load_config
from grpo.run.main import run_main

grpo.data.questions.permutation = lambda seed, epoch, size: np.arange(size)  # file order
if os.environ["CHUNKS"] == "fixed":
    grpo.runtime.distributed.World.deal = lambda world, count: iter(range(world.rank, count, world.size))
sys.exit(run_main(train.train, load_config, sys.argv[1:]))
"""


def run(folder: Path, nproc: int, *settings: str, script: str = "train.py", **variables: str) -> list[dict[str, float]]:
    """Train on the demo; return the steps' metrics, the first two left out (warming up)."""
    command = [
        sys.executable,
        "launch/torchrun.py",
        "--standalone",
        f"--nproc_per_node={nproc}",
        script,
        "--config",
        "configs/demo.yaml",
        "--num_threads",
        "1",
        "--output_dir",
        str(folder / "output"),
        "--runs_dir",
        str(folder / "runs"),
        "--eval_data",
        "null",
        "--resume",
        "never",
        "--save_steps",
        "0",
        *settings,
    ]
    subprocess.run(command, cwd=PROJECT, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL)
    [file] = [path for path in (folder / "runs").glob("*/metrics.jsonl") if "previous" not in str(path)]
    return [json.loads(line) for line in file.read_text().splitlines()][2:]


def shown(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def seconds(nproc: int) -> dict[str, float]:
    """Train on the demo's first steps; seconds of each phase, and the share of it that ranks waited for each other."""
    with tempfile.TemporaryDirectory() as name:
        steps = run(Path(name), nproc, "--max_steps", "12", "--rollout_chunk_rows", "8", "--batch_size", "16")
    found = {phase: sum(row[f"time/{phase}_s"] for row in steps) for phase in PHASES}
    waits = {phase: sum(row[f"idle/{phase}"] * row[f"time/{phase}_s"] for row in steps) for phase in PHASES[:2]}
    return found | {f"waiting in {phase}": waits[phase] / found[phase] for phase in waits}


def speed_up(pairs: int) -> None:
    """One process, two, and two apart at once, in turn."""
    ratios: dict[str, dict[str, list[float]]] = {"two ranks": {}, "two runs at once": {}}
    waiting: dict[str, list[float]] = {}
    for _ in range(pairs):
        alone, two = seconds(1), seconds(2)
        with ThreadPoolExecutor(2) as pool:
            apart = list(pool.map(seconds, (1, 1)))
        for phase in PHASES:
            ratios["two ranks"].setdefault(phase, []).append(alone[phase] / two[phase])
            slowest = max(run[phase] for run in apart)
            ratios["two runs at once"].setdefault(phase, []).append(2 * alone[phase] / slowest)
        for phase in PHASES[:2]:
            waiting.setdefault(phase, []).append(two[f"waiting in {phase}"])
    for kind, phases in ratios.items():
        for phase, values in phases.items():
            print(f"speed-up of {kind}, {phase}: {shown(values)}", flush=True)
    for phase, values in waiting.items():
        print(f"share of the two ranks' time spent waiting, {phase}: {shown(values)}", flush=True)


def balance(pairs: int) -> None:
    """Dealt and fixed chunks in turn, on alternating long and short answers."""
    idle: dict[str, list[float]] = {"dealt": [], "fixed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder / "base", 2, "--max_steps", "40")  # a model that works problems out
        model = next((folder / "base" / "output").glob("checkpoint_*"))
        rows = [json.loads(line) for line in (PROJECT / "demo" / "train.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row["question"] += "\n#### " if i % 2 else "\n"
        (folder / "skewed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "start.py").write_text(START)
        settings = [
            "--model",
            str(model),
            "--data",
            str(folder / "skewed.jsonl"),
            "--prompt_template",
            "{question}",
            "--rollout_chunk_rows",
            "8",
            "--batch_size",
            "16",
            "--max_steps",
            "10",
        ]
        for _ in range(pairs):
            for chunks, values in idle.items():
                steps = run(folder / "run", 2, *settings, script=f"{folder}/start.py", CHUNKS=chunks)
                values.append(statistics.mean(row["idle/rollout"] for row in steps))
    for chunks, values in idle.items():
        print(f"idle share of the rollout, chunks {chunks}: {shown(values)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["balance", "speed_up"])
    args = parser.parse_args()
    if args.only != "speed_up":
        balance(args.pairs)
    if args.only != "balance":
        speed_up(args.pairs)
