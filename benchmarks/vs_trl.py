"""TRL's GRPOTrainer and this trainer in turn, step by step, on the same model, questions, rewards and threads.

    pip install trl==1.16.0                                            (or --trl_python another/bin/python)
    python -m benchmarks.vs_trl --workload demo [--pairs 7] [--steps 2] [--gsm8k train.jsonl] [-- --our_setting value]
    python -m benchmarks.vs_trl --workload smollm2 --model FILE.gguf --gsm8k train.jsonl [--quick]

Both sides are real training runs in processes of their own; only one works at a time. A pair is `steps` steps of
one and then of the other, who goes first alternates; the first pair warms up and is not counted. The learning rate is
1e-12 on both sides, so that the work stays the same. Ratios are TRL's over ours (tokens a second: ours over TRL's),
lowest - median - highest over the pairs; memory is each side's peak above its own idle process.

Settings on TRL's side: no gradient checkpointing, no dropout, beta 0, loss_type grpo, generation over the whole step at
once; fp32, or, with `--dtype bf16` (workload `gpu`: always), weights and optimizer in bf16, where ours are fp32 with
bf16 products. Where there is a GPU both sides use one, unless `--device cpu`, and memory is the GPU's. Control:
`--control` runs TRL on both sides; every ratio must be near 1. `--control ROWS` gives the first of them micro-batches
of ROWS rows, and so finds TRL's best.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.workloads import PROJECT, Workload, make


class Side:
    """A child that steps when told."""

    def __init__(
        self, which: str, python: str, work: Workload, folder: Path, threads: int, more: list[str], log: str = "log"
    ):
        """log: where its output goes, a file in `folder` or elsewhere."""
        read, write = os.pipe()
        folder.mkdir()
        self.log = (folder / log).open("a")
        self.process = subprocess.Popen(
            [
                python,
                "-m",
                "benchmarks.vs_trl_sides",
                which,
                json.dumps(dataclasses.asdict(work)),
                str(folder),
                str(threads),
                *more,
            ],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            pass_fds=[write],
            env={**os.environ, "STEPS_FD": str(write), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
        )
        os.close(write)
        self.steps = os.fdopen(read)
        self.folder = folder

    def run(self, steps: int) -> dict[str, float]:
        """Take `steps` steps; sums of everything, and the peak."""
        total: dict[str, float] = {}
        for _ in range(steps):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = self.steps.readline()
            if not line:
                log = Path(self.log.name)
                raise SystemExit(f"a side ended early:\n{log.read_text()[-3000:] if log.is_file() else log}")
            for name, value in json.loads(line).items():
                total[name] = max(total.get(name, 0.0), value) if name == "peak_mb" else total.get(name, 0.0) + value
        if "before_update_s" in total:
            total["update_s"] = total["step_s"] - total["before_update_s"]
        return total

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def spread(values: list[float]) -> str:
    """Lowest - median - highest."""
    return f"{min(values):.2f} - {statistics.median(values):.2f} - {max(values):.2f}"


Pair = tuple[dict[str, float], dict[str, float]]  # of sums over the steps of one turn


def turns(sides: Sequence[Side], pairs: int, steps: int) -> Iterator[Pair]:
    """Steps of both sides, who goes first alternates; the first pair warms up. Ends the sides."""
    try:
        for turn in range(pairs + 1):
            order = (0, 1) if turn % 2 else (1, 0)
            found = {which: sides[which].run(steps) for which in order}
            yield found[0], found[1]
    finally:
        for side in sides:
            side.close()


def ratios_of(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """TRL's over ours, of each pair (tokens a second and memory: ours over TRL's)."""
    rate = lambda side: side["new_tokens"] / side["rollout_s"]  # noqa: E731
    return {
        "rollout tokens/s": [rate(ours) / rate(theirs) for ours, theirs in pairs],
        "update": [theirs["update_s"] / ours["update_s"] for ours, theirs in pairs],
        "whole step": [theirs["step_s"] / ours["step_s"] for ours, theirs in pairs],
        "peak memory, ours/theirs": [ours["peak_mb"] / theirs["peak_mb"] for ours, theirs in pairs[-1:]],
        "step time per new token": [
            (theirs["step_s"] / theirs["new_tokens"]) / (ours["step_s"] / ours["new_tokens"]) for ours, theirs in pairs
        ],
    }


def report(name: str, pairs: Sequence[Pair], steps: int) -> None:
    """One table row of ratios, and what they are made of."""
    print(f"\n## {name}: {len(pairs)} pairs of {steps} steps")
    for what, values in ratios_of(pairs).items():
        print(f"{what:26} {spread(values)}")
    middle = lambda side, key: statistics.median(pair[side].get(key, 0.0) for pair in pairs) / steps  # noqa: E731
    print(f"\n{'a step, medians':26} {'ours':>12} {'TRL':>12}")
    for key in ("step_s", "rollout_s", "update_s", "new_tokens", "no_grad", "grad"):
        print(f"{key:26} {middle(0, key):12.3f} {middle(1, key):12.3f}")
    print(f"{'peak_mb above idle':26} {pairs[-1][0]['peak_mb']:12.1f} {pairs[-1][1]['peak_mb']:12.1f}", flush=True)


def main() -> int:
    """Start both sides, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a pair")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--trl_rows", type=int, help="rows of TRL's micro-batch")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of both sides; default: the workload's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--model", help="of the workloads smollm2 and real")
    parser.add_argument(
        "--quick", action="store_true", help="2 pairs of one step, half of the prompts and of long completions"
    )
    parser.add_argument("--control", nargs="?", type=int, const=0, metavar="ROWS", help="TRL against TRL")
    parser.add_argument("--alone", action="store_true", help="ours alone, where TRL cannot or would take hours")
    args, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make(args.workload, folder, args.gsm8k, args.model)
        if args.quick:
            args.pairs, args.steps = 2, 1
            shorter = min(work.max_new, max(512, work.max_new // 2))
            work = dataclasses.replace(work, prompts=max(1, work.prompts // 2), max_new=shorter)
        rows = min(args.trl_rows or work.trl_rows, work.prompts * work.group)
        work = dataclasses.replace(work, trl_rows=rows, dtype=args.dtype or work.dtype, device=args.device)
        if args.alone:
            side = Side("ours", sys.executable, work, folder / "ours", args.threads, more)
            try:
                for turn in range(args.pairs + 1):
                    found = side.run(args.steps)
                    print(
                        f"turn {turn}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True
                    )
            finally:
                side.close()
            return 0
        control = args.control is not None
        first = ("trl", args.trl_python) if control else ("ours", sys.executable)
        first_work = dataclasses.replace(work, trl_rows=min(args.control or work.trl_rows, work.prompts * work.group))
        sides = [
            Side(*first, first_work, folder / "first", args.threads, more),
            Side("trl", args.trl_python, work, folder / "second", args.threads, []),
        ]
        names = ("TRL, first" if control else "ours", "TRL")
        pairs = []
        for turn, pair in enumerate(turns(sides, args.pairs, args.steps)):
            pairs.append(pair)
            seconds = [f"{name} {found['step_s']:.2f} s" for name, found in zip(names, pair, strict=True)]
            print(f"pair {turn} ({'warm-up' if not turn else 'counted'}): {', '.join(seconds)}", flush=True)
        report(args.workload, pairs[1:], args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
