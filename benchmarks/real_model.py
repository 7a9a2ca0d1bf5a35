"""Train the real model as launch/real_model.sh does, for several seeds, beside its control; print figures, draw curves.

    python -m benchmarks.real_model --model FILE.gguf                    seeds 1 2 3, docs/real_model_curves.png
    python -m benchmarks.real_model --model FILE.gguf --dtype bf16       what it does not know itself goes to train.py

The control trains on shuffled rewards (shuffled_reward.py). Accuracy is greedy, on the 512 held-out questions; gains
are paired by question. Such an interval speaks of the choice of questions and not of the chance in training, which
moves a model in a direction of its own with every seed: hence also Student's interval over the seeds. It holds when the
latter contains 0 for the control, and every other run gains 15 points at least. Results are appended to --results, and
those that stand there are not measured again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.demo_curves import PROJECT, plot

SHUFFLED = {"benchmarks/shuffled_reward.py:shuffled_last_number_reward": 1.0}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
COMPARED = re.compile(r"B - A: ([-+\d.]+) points, 95% interval ([-+\d.]+) to ([-+\d.]+)")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    seed: int
    shuffled: bool
    settings: list[str]
    wall_s: float
    before: float
    after: float
    gain: list[float]  # points: the difference, and its paired 95 % interval
    steps: list[dict[str, float]]


def checked(command: list[str]) -> str:
    """The standard output of a command; ends this program where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    return done.stdout


def run(model: str, seed: int, shuffled: bool, extra: list[str]) -> Run:
    """Train on two processes in a temporary folder, then compare the checkpoint with its base."""
    with tempfile.TemporaryDirectory() as folder:
        control = ["--rewards", json.dumps(SHUFFLED)] if shuffled else []
        places = ["--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs"]
        settings = [
            "--config",
            "configs/smollm2.yaml",
            "--model",
            model,
            "--seed",
            str(seed),
            *control,
            *extra,
            *places,
        ]
        start_s = time.monotonic()
        checked([*TORCHRUN, "train.py", *settings])
        wall_s = time.monotonic() - start_s
        asked = ["--output_dir", f"{folder}/output", "--base", model, "--marks", "none"]
        compared = checked([*TORCHRUN, "-m", "grpo.evaluate", *asked])
        [file] = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = COMPARED.search(compared)
    if found is None:
        sys.exit(compared[-2000:])
    evals = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    kept = ("step", "reward/mean", "completions/length_mean", "time/step_s")
    steps = [{key: row[key] for key in kept} for row in rows if "reward/mean" in row]
    return Run(seed, shuffled, extra, wall_s, evals[0], evals[-1], [float(part) for part in found.groups()], steps)


def over_seeds(gains: list[float]) -> tuple[float, float, float]:
    """Mean of two to six gains, and Student's 95 % interval.

    >>> [round(x, 2) for x in over_seeds([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[len(gains)]
    mean, half = statistics.mean(gains), quantile * statistics.stdev(gains) / len(gains) ** 0.5
    return mean, mean - half, mean + half


def table(results: list[Run]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| rewards | seed | before | after | gain, points | paired 95 % interval | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        gain, low, high = r.gain
        name = "shuffled" if r.shuffled else "true"
        cells = (name, r.seed, f"{r.before:.1%}", f"{r.after:.1%}", f"{gain:+.1f}", f"{low:+.1f} to {high:+.1f}")
        lines.append("| " + " | ".join(map(str, (*cells, f"{r.wall_s:.0f}"))) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a .gguf file, a folder or a hub name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", default="output/real_model_results.jsonl", help="JSONL file, appended to")
    parser.add_argument("--plot", default="docs/real_model_curves.png", help="where to draw the curves; empty: nowhere")
    args, extra = parser.parse_known_args()
    file = Path(args.results)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    results = [Run(**json.loads(line)) for line in lines]
    results = [r for r in results if r.settings == extra and r.seed in args.seeds]
    for shuffled in (False, True):
        for seed in args.seeds:
            if any((r.seed, r.shuffled) == (seed, shuffled) for r in results):
                continue
            results.append(run(args.model, seed, shuffled, extra))
            with file.open("a", encoding="utf-8") as appended:
                appended.write(json.dumps(asdict(results[-1])) + "\n")
            print(table(results[-1:]).splitlines()[-1], flush=True)
    results.sort(key=lambda r: (r.shuffled, r.seed))
    print("\n" + table(results))
    if args.plot:
        plot(results, PROJECT / args.plot)
    gains = {shuffled: [r.gain[0] for r in results if r.shuffled == shuffled] for shuffled in (False, True)}
    for shuffled, name in ((False, "true"), (True, "shuffled")):
        if len(gains[shuffled]) > 1:
            mean, low, high = over_seeds(gains[shuffled])
            print(f"{name}: {mean:+.1f} points, 95 % interval over seeds {low:+.1f} to {high:+.1f}")
    held = all(gain >= 15 for gain in gains[False]) and (len(gains[True]) < 2 or low <= 0 <= high)
    print("holds" if held else "FAILS", "15 points with true rewards; with shuffled ones the interval contains 0")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
