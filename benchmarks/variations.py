"""Every preset, and every way of choosing groups, on the demo: what is learned, how fast, beside a control.

The control's rewards are the true ones shuffled within each group; with `reinforce_pp`, whose baseline is the batch's,
they are random, because the mean of a group that is left as it is would teach.

    python -m benchmarks.variations --results FILE.jsonl                   all cases, seeds 1 2 3, one control each
    python -m benchmarks.variations --results FILE.jsonl --cases dapo gspo --seeds 1 --jobs 2

Each case runs with one update a step, where ratios are 1, and with four. A run is one process with one thread, so that
several can share a machine; seconds then compare cases of one call only. Rates are those of configs/demo.yaml for all:
the table says what a preset does where it stands, not what it could do at a rate of its own. Results are appended to
--results; runs that stand there are not done again.

    after     greedy accuracy on the held-out questions after the last step
    0.9 in    steps until the mean reward of five steps is 0.9, and completion tokens sampled by then
    clipped   share of trained tokens whose gradient the clip stopped
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.config.algorithm import PRESETS

PROJECT = Path(__file__).resolve().parents[1]
FEW = ["--data_rows", "64"]  # so that questions come up often: the stream has 7.5 epochs of them
CASES: dict[str, list[str]] = {
    **{name: ["--algorithm", name] for name in PRESETS},
    "drop": ["--filter_groups", "drop"],
    "resample": ["--filter_groups", "resample"],
    "64 questions": FEW,
    "64, difficulty": [*FEW, "--difficulty_range", "[0.1, 0.9]", "--difficulty_rest", "1"],
    "64, resample": [*FEW, "--filter_groups", "resample"],
}
SHUFFLED = {"benchmarks/shuffled_reward.py:shuffled_final_answer_reward": 1.0}
RANDOM = {"benchmarks/shuffled_reward.py:random_reward": 1.0}  # shuffling within groups leaves each group's mean
REACHED, WINDOW = 0.9, 5


def run(case: str, minibatches: int, seed: int, shuffled: bool) -> dict[str, Any]:
    """Train once, in a temporary folder."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/demo.yaml", *CASES[case]]
        command += ["--num_minibatches", str(minibatches), "--seed", str(seed), "--num_threads", "1"]
        command += ["--save_steps", "0", "--report_to", "none", "--log_samples_steps", "0"]
        command += ["--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs"]
        control = RANDOM if case == "reinforce_pp" else SHUFFLED
        command += ["--rewards", json.dumps(control)] if shuffled else []
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        lines = [json.loads(line) for line in (next(Path(folder, "runs").iterdir()) / "metrics.jsonl").open()]
    key = next(name for line in lines for name in line if name.startswith("eval/") and "reward" in name)
    evals = [line[key] for line in lines if key in line]
    steps = [line for line in lines if "loss" in line]
    return {
        "case": case,
        "minibatches": minibatches,
        "seed": seed,
        "shuffled": shuffled,
        "before": evals[0],
        "after": evals[-1],
        "seconds": time.monotonic() - began,
        "reward": [line["reward/mean"] for line in steps],
        "tokens": [line["completions/tokens"] for line in steps],
        "drawn": [line.get("groups/drawn", 8.0) for line in steps],
        "clipped": statistics.fmean(line.get("clip/low", 0.0) + line.get("clip/high", 0.0) for line in steps),
    }


def reached(one: dict[str, Any]) -> tuple[int, float] | None:
    """Steps and sampled tokens until the mean reward of WINDOW steps is REACHED; None: never.

    >>> reached({"reward": [0.0, *[0.9] * 5, 1.0], "tokens": [10.0] * 7})
    (6, 60.0)
    """
    rewards = one["reward"]
    for end in range(WINDOW, len(rewards) + 1):
        if statistics.fmean(rewards[end - WINDOW : end]) >= REACHED - 1e-9:
            return end, sum(one["tokens"][:end])
    return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line for each case and number of updates."""
    lines = [
        "| case | updates a step | before | after | 0.9 in, steps | tokens by then | clipped | s | shuffled: after |",
        "| --- | ---: | ---: | --- | --- | --- | ---: | ---: | --- |",
    ]
    for case in CASES:
        for minibatches in (1, 4):
            of_case = [one for one in results if (one["case"], one["minibatches"]) == (case, minibatches)]
            runs = sorted((one for one in of_case if not one["shuffled"]), key=lambda one: one["seed"])
            if not runs:
                continue
            found = [reached(one) for one in runs]
            steps = ", ".join("never" if one is None else str(one[0]) for one in found)
            tokens = ", ".join("-" if one is None else f"{one[1] / 1000:.0f}k" for one in found)
            control = ", ".join(f"{one['after']:.1%}" for one in of_case if one["shuffled"])
            lines.append(
                f"| `{case}` | {minibatches} | {runs[0]['before']:.1%} | "
                f"{', '.join(format(one['after'], '.1%') for one in runs)} | {steps} | {tokens} | "
                f"{statistics.fmean(one['clipped'] for one in runs):.2%} | "
                f"{statistics.median(one['seconds'] for one in runs):.0f} | {control or '-'} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--minibatches", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--no_control", action="store_true", help="leave out the runs with a shuffled reward")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args = parser.parse_args(argv)
    wanted = [(case, m, seed, False) for seed in args.seeds for m in args.minibatches for case in args.cases]
    if not args.no_control:
        wanted += [(case, args.minibatches[-1], args.seeds[0], True) for case in args.cases]
    results = [json.loads(line) for line in args.results.open()] if args.results.exists() else []
    there = {(one["case"], one["minibatches"], one["seed"], one["shuffled"]) for one in results}

    def measure(what: tuple[str, int, int, bool]) -> None:
        one = run(*what)
        with args.results.open("a") as file:
            file.write(json.dumps(one) + "\n")
        results.append(one)
        print(*what, f"{one['before']:.1%} -> {one['after']:.1%}, 0.9 in {reached(one)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, [what for what in wanted if what not in there]))
    print(table(results))


if __name__ == "__main__":
    main()
