"""What `rollout_ahead: 1` saves and costs: the demo with a vLLM server, with it and without, one core for each side.

    taskset -c 1 bash launch/vllm_server.sh --model demo/base --dtype float32 --enforce-eager --max-model-len 1024
    GRPO_SERVER_TOKEN=... python -m benchmarks.rollout_ahead --server http://127.0.0.1:8100 [--seeds 1 2 3] [settings]

The trainer runs on core 0 with one thread, the server on core 1. Runs with 0 and with 1 take turns. `step` is the
median of a run's steps, `waited` their rollout phase, in which the trainer does nothing but wait. The learning curve is
the mean reward of ten steps each, `after` the greedy accuracy on the held-out questions. Control: the same steps whose
rewards are shuffled within groups.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.variations import SHUFFLED

PROJECT = Path(__file__).resolve().parents[1]


def run(server: str, ahead: int, seed: int, shuffled: bool, more: list[str]) -> list[dict[str, float]]:
    """The metrics of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/demo.yaml", "--seed", str(seed)]
        command += ["--rollout_engine", "vllm", "--rollout_server", server, "--rollout_ahead", str(ahead)]
        command += ["--num_threads", "1", "--reward_workers", "0", "--save_steps", "0", "--report_to", "none"]
        command += ["--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs", *more]
        command += ["--rewards", json.dumps(SHUFFLED)] if shuffled else []
        pin = lambda: os.sched_setaffinity(0, {0})  # noqa: E731
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, preexec_fn=pin)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        return [json.loads(line) for line in (next(Path(folder, "runs").iterdir()) / "metrics.jsonl").open()]


def summary(lines: list[dict[str, float]]) -> str:
    """A line of figures."""
    steps = [line for line in lines if "loss" in line]
    middle = lambda name: statistics.median(line[name] for line in steps[1:])  # noqa: E731
    largest = lambda name: max(line.get(name, 0.0) for line in steps)  # noqa: E731
    curve = [statistics.fmean(line["reward/mean"] for line in steps[at : at + 10]) for at in range(0, len(steps), 10)]
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    return (
        f"step {middle('time/step_s'):.3f} s, waited {middle('time/rollout_s'):.3f}, all "
        f"{sum(line['time/step_s'] for line in steps):.1f} s; reward {' '.join(f'{mean:.2f}' for mean in curve)}; "
        f"{accuracy[0]:.1%} -> {accuracy[-1]:.1%}; sampler_gap/mean at most {largest('sampler_gap/mean'):.2g}, "
        f"sampler/ess at least {min(line.get('sampler/ess', 1.0) for line in steps):.3f}"
    )


def main() -> None:
    """Take turns, then the control."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, more = parser.parse_known_args()
    for i, seed in enumerate(args.seeds):
        for ahead in (0, 1) if i % 2 == 0 else (1, 0):
            print(
                f"seed {seed}, rollout_ahead {ahead}: {summary(run(args.server, ahead, seed, False, more))}", flush=True
            )
    for ahead in (0, 1):
        control = run(args.server, ahead, args.seeds[0], True, more)
        print(f"control, rollout_ahead {ahead}: {summary(control)}", flush=True)


if __name__ == "__main__":
    main()
