"""Two ranks against one, and dealt chunks against fixed ones, on a workload that is skewed on purpose.

    python benchmarks/two_ranks.py [--pairs 5]

speed-up   the demo with one thread a process: seconds of one process over seconds of two, for the rollout and for
           the micro-batches of the update. Runs alternate; medians, lowest and highest in brackets.
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
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PATCHES = """
import os
import numpy as np
import grpo.data, grpo.distributed
from reward_func import final_answer_reward

grpo.data.permutation = lambda seed, epoch, size: np.arange(size)  # file order
if os.environ["CHUNKS"] == "fixed":
    grpo.distributed.World.deal = lambda world, count: iter(range(world.rank, count, world.size))
"""


def run(folder: Path, nproc: int, *settings: str, **variables: str) -> list[dict[str, float]]:
    """Train; return the steps' metrics, the first two left out (warming up)."""
    command = [
        sys.executable, "launch/torchrun.py", "--standalone", f"--nproc_per_node={nproc}", "train.py",
        "--num_threads", "1", "--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs"),
        "--eval_data", "null", "--resume", "never", "--save_steps", "0", *settings,
    ]  # fmt: skip
    subprocess.run(command, cwd=PROJECT, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL)
    [file] = [path for path in (folder / "runs").glob("*/metrics.jsonl") if "previous" not in str(path)]
    return [json.loads(line) for line in file.read_text().splitlines()][2:]


def shown(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def speed_up(pairs: int) -> None:
    """One process and two in turn, on the demo's first steps."""
    ratios: dict[str, list[float]] = {"rollout": [], "micro_batches": []}
    for _ in range(pairs):
        rows = []
        for nproc in (1, 2):
            with tempfile.TemporaryDirectory() as name:
                rows.append(
                    run(Path(name), nproc, "--max_steps", "12", "--rollout_chunk_rows", "8", "--batch_size", "16")
                )
        for phase, values in ratios.items():
            one, two = (sum(row[f"time/{phase}_s"] for row in steps) for steps in rows)
            values.append(one / two)
    for phase, values in ratios.items():
        print(f"speed-up of two ranks, {phase}: {shown(values)}", flush=True)


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
        (folder / "patches.py").write_text(PATCHES)
        settings = [
            "--model", str(model), "--data", str(folder / "skewed.jsonl"), "--config", "configs/demo.yaml",
            "--prompt_template", "{question}", "--rollout_chunk_rows", "8", "--batch_size", "16", "--max_steps", "10",
            "--rewards", json.dumps({f"{folder}/patches.py:final_answer_reward": 1.0}),
        ]  # fmt: skip
        for _ in range(pairs):
            for chunks, values in idle.items():
                steps = run(folder / "run", 2, *settings, CHUNKS=chunks)
                values.append(statistics.mean(row["idle/rollout"] for row in steps))
    for chunks, values in idle.items():
        print(f"idle share of the rollout, chunks {chunks}: {shown(values)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    balance(args.pairs)
    speed_up(args.pairs)
