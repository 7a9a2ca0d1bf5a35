"""Wall time, and sampled tokens, until the mean training reward reaches a threshold: this trainer and GRPOTrainer.

    pip install trl==1.16.0                                            (or --trl_python another/bin/python)
    python -m benchmarks.time_to_reward [--seeds 5] [--sweep 5e-5 1e-4 2e-4 5e-4] [--threshold 0.8] [--max_steps 60]
    python -m benchmarks.time_to_reward --workload real --model FILE.gguf --seeds 3 --sweep 5e-6 1e-5 2e-5

Both sides are real runs (benchmarks/vs_trl_sides.py) on the demo's base, questions and number reward, or (`real`) on
SmolLM2-135M-Instruct and the task of demo/real_model: 8 prompts a step, 8 completions each, loss grpo, clip 0.2,
beta 0, constant rate, AdamW (0.9, 0.999) without decay, norm clipped at 1. Reached: the end of the first step where the
mean reward over the last 5 steps is at least the threshold. Seconds are those of the steps up to there, start-up left
out. The sides take steps in turn, one works at a time; who is done, or has had --max_steps steps or --cap_s seconds,
leaves the other alone. With --together both work at once, each on --threads cores of its own, so that what else the
machine does meets both. With --whole a run goes on after the threshold. --curves writes every step.

First a sweep, one seed, gives each side its own best rate: fewest seconds, or, where none reached it or the runs are
whole, the highest last mean; --rates gives them instead. Then --seeds other seeds at that rate. Control: our side, same
rate and as many steps, on rewards shuffled within their group (benchmarks/shuffled_reward.py), must not reach it; exit
code 1 when it does.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.vs_trl import Side
from benchmarks.workloads import PROJECT, Workload, make

WINDOW = 5  # steps of the running mean
SWEEP_SEED = 1000
FIRST_SEED = 1
SHUFFLED = f"{PROJECT / 'benchmarks' / 'shuffled_reward.py'}:shuffled_"
NAMES = {"ours": "ours", "trl": "TRL"}


@dataclass
class Race:
    """One side's way to the threshold."""

    threshold: float
    max_steps: int
    cap_s: float
    whole: bool = False  # go on after it
    rewards: list[float] = dataclasses.field(default_factory=list)  # mean of each step
    seconds: list[float] = dataclasses.field(default_factory=list)  # from the start to the end of each step
    tokens: list[float] = dataclasses.field(default_factory=list)  # sampled from the start to the end of each step

    def add(self, reward: float, seconds: float, tokens: float) -> None:
        """A step more."""
        self.rewards.append(reward)
        self.seconds.append(seconds + (self.seconds[-1] if self.seconds else 0.0))
        self.tokens.append(tokens + (self.tokens[-1] if self.tokens else 0.0))

    def mean(self, steps: int | None = None) -> float:
        """Of the last steps up to this one; -inf before there are enough."""
        known = self.rewards[:steps]
        return statistics.fmean(known[-WINDOW:]) if len(known) >= WINDOW else -math.inf

    @property
    def reached(self) -> int | None:
        """The first step that reached it; None: none did."""
        return next((n for n in range(1, len(self.rewards) + 1) if self.mean(n) >= self.threshold), None)

    @property
    def over(self) -> bool:
        """Whether no further step is taken."""
        ended = self.reached is not None and not self.whole
        return ended or len(self.rewards) >= self.max_steps or bool(self.seconds and self.seconds[-1] >= self.cap_s)

    def at(self, values: list[float]) -> float:
        """A sum up to the threshold; inf: not reached."""
        return math.inf if self.reached is None else values[self.reached - 1]

    def __str__(self) -> str:
        end = f"last mean {self.mean():.2f} after {len(self.rewards)} steps, {self.seconds[-1]:.0f} s"
        if self.reached is None:
            return f"not reached ({end})"
        return f"{self.at(self.seconds):7.1f} s {self.reached:4d} steps {self.at(self.tokens):.0f} tokens ({end})"


def race(runs: list[tuple[str, str, Workload, list[str]]], args: argparse.Namespace) -> list[Race]:
    """Run (side, python, workload, own settings) in turn until all are over."""
    with tempfile.TemporaryDirectory() as name:
        sides = [
            Side(which, python, work, Path(name) / str(i), args.threads, more)
            for i, (which, python, work, more) in enumerate(runs)
        ]
        races = [Race(args.threshold, args.max_steps, args.cap_s, args.whole) for _ in sides]

        def go(i: int, steps: float) -> None:
            """So many steps more of a side, or all."""
            while steps > 0 and not races[i].over:
                step, steps = sides[i].run(1), steps - 1
                races[i].add(step["reward"], step["step_s"], step["new_tokens"])

        try:
            if args.together:
                for i, side in enumerate(sides):
                    os.sched_setaffinity(side.process.pid, range(i * args.threads, (i + 1) * args.threads))
                with ThreadPoolExecutor(len(sides)) as pool:
                    list(pool.map(lambda i: go(i, math.inf), range(len(sides))))
            turn = 0
            while not all(one.over for one in races):
                for i in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
                    go(i, 1)
                turn += 1
        finally:
            for side in sides:
                side.close()
    if args.curves:
        with open(args.curves, "a", encoding="utf-8") as file:
            for (which, _, work, _), one in zip(runs, races, strict=True):
                told = {"side": which, "lr": work.lr, "seed": work.seed, "reward": work.reward.rpartition(":")[2]}
                steps = {"rewards": one.rewards, "seconds": one.seconds, "tokens": one.tokens}
                file.write(json.dumps(told | steps) + "\n")
    return races


def best(sweep: dict[float, Race], whole: bool = False) -> float:
    """The rate that was fastest; where none reached the threshold, or runs are whole, the one that ended highest.

    >>> def run(reward, seconds):
    ...     return Race(0.5, 9, 9.0, False, [reward] * 5, [seconds] * 5, [0.0] * 5)
    >>> best({1e-4: run(0.6, 4.0), 2e-4: run(0.5, 3.0), 5e-4: run(0.1, 1.0)})
    0.0002
    """
    return min(sweep, key=lambda lr: (0.0 if whole else sweep[lr].at(sweep[lr].seconds), -sweep[lr].mean()))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """TRL's median over ours, and each seed's; inf stands for not reached."""
    quotient = lambda a, b: a / b if math.isfinite(b) else math.nan  # noqa: E731
    each = ", ".join(f"{quotient(b, a):.2f}" for a, b in zip(ours, theirs, strict=True))
    return f"{quotient(statistics.median(theirs), statistics.median(ours)):.2f} (seeds: {each})"


def report(results: dict[int, list[Race]], rates: dict[str, float], threshold: float) -> None:
    """Print the seeds, their medians and the ratio."""
    print(f"\n## time to a mean reward of {threshold:g} over {WINDOW} steps")
    for which, lr in rates.items():
        print(f"{NAMES[which]:5} at lr {lr:g}")
    for seed, races in results.items():
        print(f"seed {seed}: " + "; ".join(f"{NAMES[which]} {one}" for which, one in zip(rates, races, strict=True)))
    for what in ("seconds", "tokens"):
        found = [[races[i].at(getattr(races[i], what)) for races in results.values()] for i in range(len(rates))]
        middles = [statistics.median(own) for own in found]
        said = [f"{NAMES[which]} {middle:.1f}" for which, middle in zip(rates, middles, strict=True)]
        print(f"median {what}: {', '.join(said)}; TRL / ours {ratio(*found)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1 on")
    parser.add_argument("--sweep", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4, 5e-4], help="learning rates")
    parser.add_argument("--rates", type=float, nargs=2, help="ours and TRL's, in place of the sweep")
    parser.add_argument("--threshold", type=float, default=0.8, help="of the mean reward, whose highest value is 1")
    parser.add_argument("--max_steps", type=int, default=60, help="of a run")
    parser.add_argument("--cap_s", type=float, default=300.0, help="seconds of steps of a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workload", choices=["demo", "real"], default="demo")
    parser.add_argument("--model", help="with real: SmolLM2-135M-Instruct")
    parser.add_argument("--together", action="store_true", help="both sides at once, on cores of their own")
    parser.add_argument("--whole", action="store_true", help="go on after the threshold")
    parser.add_argument("--curves", help="JSONL file to append every run's steps to")
    return parser.parse_args()


def main() -> int:
    """Sweep, race, control."""
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        base = make(args.workload, Path(name), model=args.model)
        pythons = {"ours": sys.executable, "trl": args.trl_python}
        at = lambda lr, seed: dataclasses.replace(base, lr=lr, seed=seed)  # noqa: E731
        sweeps: dict[str, dict[float, Race]] = {which: {} for which in pythons}
        for lr in () if args.rates else args.sweep:
            races = race([(which, python, at(lr, SWEEP_SEED), []) for which, python in pythons.items()], args)
            for which, one in zip(pythons, races, strict=True):
                sweeps[which][lr] = one
                print(f"sweep, lr {lr:g}: {NAMES[which]:5} {one}", flush=True)
        rates = {which: best(sweep, args.whole) for which, sweep in sweeps.items() if sweep}
        rates = rates or dict(zip(pythons, args.rates, strict=True))
        results = {}
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            results[seed] = race([(w, python, at(rates[w], seed), []) for w, python in pythons.items()], args)
            print(f"seed {seed} done", flush=True)
        demo = args.workload == "demo"
        function = "final_answer_reward" if demo else "last_number_reward"
        shuffled = dataclasses.replace(at(rates["ours"], FIRST_SEED), reward=SHUFFLED + function)
        [control] = race([("ours", sys.executable, shuffled, ["--answer_format", "hash"] if demo else [])], args)
    report(results, rates, args.threshold)
    print(f"control, rewards shuffled, lr {rates['ours']:g}: {control}")
    if control.reached is not None:
        print("FAILS: the control reached it")
    return int(control.reached is not None)


if __name__ == "__main__":
    sys.exit(main())
