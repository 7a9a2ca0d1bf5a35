"""Deterministic mode, the whole script: equal weights, bit by bit, on 1 to 4 processes, however they are launched.

    python benchmarks/deterministic.py [--max_ranks 4]

train.py on the demo for 6 steps, under torchrun, with OMP_NUM_THREADS, in which launchers differ, at the number of
processes. Printed: sha256 of the weights in the last checkpoint. Controls: without `deterministic`, one process and
two; with it, another seed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 6


def weights_after(ranks: int, threads: int, deterministic: str, seed: int) -> str:
    """Train; return the sha256 of the weights' file."""
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable,
            "launch/torchrun.py",
            "--standalone",
            f"--nproc_per_node={ranks}",
            "train.py",
            "--max_steps",
            str(STEPS),
            "--eval_data",
            "null",
            "--rollout_chunk_rows",
            "8",
            "--resume",
            "never",
            "--deterministic",
            deterministic,
            "--seed",
            str(seed),
            "--output_dir",
            f"{name}/output",
            "--runs_dir",
            f"{name}/runs",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=PROJECT, env=environment, check=True, stdout=subprocess.DEVNULL)
        weights = Path(name) / "output" / f"checkpoint_{STEPS}" / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max_ranks", type=int, default=4)
    args = parser.parse_args()
    runs = [(ranks, ranks, "true", 1) for ranks in range(1, args.max_ranks + 1)]
    runs += [(1, 1, "false", 1), (2, 2, "false", 1), (1, 1, "true", 2), (2, 2, "true", 2)]
    print("| deterministic | seed | processes | OMP_NUM_THREADS | sha256 of the weights, first 16 digits |")
    print("| --- | ---: | ---: | ---: | --- |", flush=True)
    for ranks, threads, deterministic, seed in runs:
        digest = weights_after(ranks, threads, deterministic, seed)
        print(f"| {deterministic} | {seed} | {ranks} | {threads} | `{digest[:16]}` |", flush=True)


if __name__ == "__main__":
    main()
