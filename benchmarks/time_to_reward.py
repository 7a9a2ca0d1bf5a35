"""Wall time until the demo's mean training reward reaches a threshold: this trainer and TRL's GRPOTrainer.

    pip install trl==1.16.0                                            (or --trl_python another/bin/python)
    python -m benchmarks.time_to_reward [--seeds 5] [--sweep 5e-5 1e-4 2e-4 5e-4] [--threshold 0.8] [--max_steps 60]

Both sides are real runs (benchmarks/vs_trl_sides.py) on the demo's base, questions and number reward: 8 prompts a step,
8 completions each, loss grpo, clip 0.2, beta 0, constant rate, AdamW (0.9, 0.999) without decay, norm clipped at 1.
Reached: the end of the first step where the mean reward over the last 5 steps is at least the threshold. Seconds are
those of the steps up to there, start-up left out. The sides take steps in turn, one works at a time; who is done, or
has had --max_steps steps or --cap_s seconds, leaves the other alone.

First a sweep, one seed, gives each side its own best rate: fewest seconds, or, where none reached it, the highest
last mean. Then --seeds other seeds at that rate. Control: our side, same rate and as many steps, on rewards shuffled
within their group (benchmarks/shuffled_reward.py), must not reach it; exit code 1 when it does.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.vs_trl import Side
from benchmarks.workloads import PROJECT, Workload, make

WINDOW = 5  # steps of the running mean
SWEEP_SEED = 1000
FIRST_SEED = 1
SHUFFLED = f"{PROJECT / 'benchmarks' / 'shuffled_reward.py'}:shuffled_final_answer_reward"
NAMES = {"ours": "ours", "trl": "TRL"}


@dataclass
class Race:
    """One side's way to the threshold."""

    threshold: float
    max_steps: int
    cap_s: float
    rewards: list[float] = dataclasses.field(default_factory=list)  # mean of each step
    seconds: float = 0.0

    def add(self, reward: float, seconds: float) -> None:
        """A step more."""
        self.rewards.append(reward)
        self.seconds += seconds

    @property
    def mean(self) -> float:
        """Of the last steps; -inf before there are enough."""
        return statistics.fmean(self.rewards[-WINDOW:]) if len(self.rewards) >= WINDOW else -math.inf

    @property
    def reached(self) -> bool:
        """Whether the last step reached it."""
        return self.mean >= self.threshold

    @property
    def over(self) -> bool:
        """Whether no further step is taken."""
        return self.reached or len(self.rewards) >= self.max_steps or self.seconds >= self.cap_s

    @property
    def result_s(self) -> float:
        """Seconds to the threshold; inf: not reached."""
        return self.seconds if self.reached else math.inf

    def __str__(self) -> str:
        steps = len(self.rewards)
        if self.reached:
            return f"{self.seconds:7.1f} s {steps:4d} steps"
        return f"not reached in {steps} steps, {self.seconds:.1f} s (last mean {self.mean:.2f})"


def race(runs: list[tuple[str, str, Workload, list[str]]], args: argparse.Namespace) -> list[Race]:
    """Run (side, python, workload, own settings) in turn until all are over."""
    with tempfile.TemporaryDirectory() as name:
        sides = [
            Side(which, python, work, Path(name) / str(i), args.threads, more)
            for i, (which, python, work, more) in enumerate(runs)
        ]
        races = [Race(args.threshold, args.max_steps, args.cap_s) for _ in sides]
        try:
            turn = 0
            while not all(one.over for one in races):
                for i in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
                    if not races[i].over:
                        step = sides[i].run(1)
                        races[i].add(step["reward"], step["step_s"])
                turn += 1
        finally:
            for side in sides:
                side.close()
    return races


def best(sweep: dict[float, Race]) -> float:
    """The rate that was fastest; where none reached the threshold, the one that came nearest.

    >>> slow, fast = Race(0.5, 9, 9.0, [0.6] * 5, 4.0), Race(0.5, 9, 9.0, [0.5] * 5, 3.0)
    >>> best({1e-4: slow, 2e-4: fast, 5e-4: Race(0.5, 5, 9.0, [0.1] * 5, 1.0)})
    0.0002
    """
    return min(sweep, key=lambda lr: (sweep[lr].result_s, -sweep[lr].mean))


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
    times = [[races[i].result_s for races in results.values()] for i in range(len(rates))]
    steps = [
        [len(races[i].rewards) if races[i].reached else math.inf for races in results.values()]
        for i in range(len(rates))
    ]
    for i, which in enumerate(rates):
        middle = (statistics.median(times[i]), statistics.median(steps[i]))
        said = f"{middle[0]:.1f} s, {middle[1]:g} steps" if math.isfinite(middle[0]) else "not reached"
        print(f"median {NAMES[which]:5} {said}")
    print(f"TRL / ours, seconds {ratio(*times)}")
    print(f"TRL / ours, steps   {ratio(*steps)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1 on")
    parser.add_argument("--sweep", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4, 5e-4], help="learning rates")
    parser.add_argument("--threshold", type=float, default=0.8, help="of the mean reward, whose highest value is 1")
    parser.add_argument("--max_steps", type=int, default=60, help="of a run")
    parser.add_argument("--cap_s", type=float, default=300.0, help="seconds of steps of a run")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Sweep, race, control."""
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        base = make("demo", Path(name))
        pythons = {"ours": sys.executable, "trl": args.trl_python}
        at = lambda lr, seed: dataclasses.replace(base, lr=lr, seed=seed)  # noqa: E731
        sweeps: dict[str, dict[float, Race]] = {which: {} for which in pythons}
        for lr in args.sweep:
            races = race([(which, python, at(lr, SWEEP_SEED), []) for which, python in pythons.items()], args)
            for which, one in zip(pythons, races, strict=True):
                sweeps[which][lr] = one
                print(f"sweep, lr {lr:g}: {NAMES[which]:5} {one}", flush=True)
        rates = {which: best(sweep) for which, sweep in sweeps.items()}
        results = {}
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            results[seed] = race([(w, python, at(rates[w], seed), []) for w, python in pythons.items()], args)
            print(f"seed {seed} done", flush=True)
        shuffled = dataclasses.replace(at(rates["ours"], FIRST_SEED), reward=SHUFFLED)
        [control] = race([("ours", sys.executable, shuffled, ["--answer_format", "hash"])], args)
    report(results, rates, args.threshold)
    print(f"control, rewards shuffled, lr {rates['ours']:g}: {control}")
    if control.reached:
        print("FAILS: the control reached it")
    return int(control.reached)


if __name__ == "__main__":
    sys.exit(main())
