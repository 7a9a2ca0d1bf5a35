"""Reward workers against calls in the trainer's own process: what isolation costs a step.

    python benchmarks/reward_workers.py
    python benchmarks/reward_workers.py --completions 2048 --pairs 9

The demo's reward on completions of the demo's length, scored in turn by both; first each once, uncounted. The control
is the answer itself: both must give the same outcomes, bit by bit. `code` is the same function marked as running
code, a process for each call. Start-up, restart and the memory of an idle worker are measured beside it.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo.config.settings import Config
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import Rewards, open_rewards

STEPS = "Mia has 7 pears. She buys 3: 10, eats 2: 8, finds 4: 12, sells 1: 11.\n#### {}"
CODE = """
from reward_func import final_answer_reward


def code_reward(completions, answer, **columns):
    return final_answer_reward(completions, answer)


def dies(completions, **columns):
    raise SystemExit if completions[0] != "die" else __import__("os")._exit(0)


code_reward.runs_code = True
"""


def samples_of(count: int) -> list[RewardInput]:
    """Groups of 8 on one prompt each, half of them right."""
    columns = [{"question": "Mia has 7 pears. " * 4, "answer": str(p)} for p in range(count // 8)]
    return [
        RewardInput(columns[i // 8]["question"], STEPS.format(i // 8 + i % 2), list(range(44)), columns[i // 8])
        for i in range(count)
    ]


def timed(rewards: Rewards, samples: list[RewardInput]) -> tuple[float, list]:
    """Seconds to score them one by one, and the answers."""
    calls = [Call(0, (i,)) for i in range(len(samples))]
    start_s = time.perf_counter()
    rewards.begin()
    rewards.submit(samples, calls)
    answers = rewards.collect(lambda: False)
    return time.perf_counter() - start_s, answers


def compare(count: int, pairs: int, kinds: dict[str, Rewards]) -> None:
    samples = samples_of(count)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(pairs + 1):
        answers = {}
        for kind in list(kinds) if turn % 2 else list(kinds)[::-1]:
            took_s, answers[kind] = timed(kinds[kind], samples)
            if turn:
                seconds[kind].append(took_s)
        assert all(given == answers["in process"] for given in answers.values()), "isolation changed a score"
    base_ms = 1e3 * statistics.median(seconds["in process"])
    for kind, taken in seconds.items():
        low, mid, high = (1e3 * f(taken) for f in (min, statistics.median, max))
        print(
            f"| {count} | {kind} | {mid:.2f} ({low:.2f} - {high:.2f}) | {count / mid * 1e3:,.0f} "
            f"| {mid - base_ms:+.2f} |"
        )


def resident_mb(marker: str) -> tuple[int, float]:
    """Processes of reward workers, and MB that they hold for themselves."""
    found, kilobytes = 0, 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if folder.name.isdigit() and marker in (folder / "cmdline").read_text():
                found += 1
                lines = (folder / "smaps_rollup").read_text().splitlines()
                kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found, kilobytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    demo = {"final_answer_reward": 1.0}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "code.py"
        file.write_text(CODE, encoding="utf-8")

        def opened(**how) -> Rewards:
            return stack.enter_context(contextlib.closing(open_rewards(Config(**how), print)))

        kinds = {"in process": opened(rewards=demo, reward_workers=0)}
        start_s = time.perf_counter()
        kinds["2 workers"] = opened(rewards=demo)
        start_s = time.perf_counter() - start_s
        count, megabytes = resident_mb(f"grpo.rewards.supervisor\0{os.getpid()}\0")
        kinds["1 worker"] = opened(rewards=demo, reward_workers=1)
        kinds["code, 2 workers"] = opened(rewards={f"{file}:code_reward": 1.0})
        print("| completions | scored by | ms a step (lowest - highest) | completions/s | ms added |")
        print("| ---: | --- | ---: | ---: | ---: |")
        for completions in args.completions:
            compare(completions, args.pairs, kinds)
        dying = opened(rewards={f"{file}:dies": 1.0}, reward_workers=1)
        samples = [RewardInput("", "die", [], {})] * 50
        took_s, _ = timed(dying, samples)
        print(
            f"start of two workers: {1e3 * start_s:.0f} ms, {count} processes, {megabytes:.0f} MB in all "
            f"(proportional); a death and a new worker: {1e3 * took_s / len(samples):.1f} ms"
        )


if __name__ == "__main__":
    main()
