"""Writes a run's folder with any number of logged completions, as a run of this project would have written it.

    python -m tests.support.many_completions FOLDER [--completions 100000] [--characters 600]

Questions come back every 50 steps, rewards rise with the step, lengths vary; texts are sentences, sums and some
Chinese.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

GROUP, GROUPS, PERIOD = 8, 8, 50  # completions of a prompt, prompts of a step, steps until a question comes back
TEXT = "so first we add the eggs then take two away which leaves wait no that is not right let us check again because "
WORDS = (TEXT + "the answer must be even 因此 我们 得到 答案 \\frac{a}{b} = 3 × 7 <think>").split()


def write_run(folder: Path, completions: int, characters: int = 600, seed: int = 1) -> None:
    """Write metrics.jsonl and rollouts-rank0.jsonl, rollouts-rank1.jsonl."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    steps = math.ceil(completions / (GROUP * GROUPS))
    written = 0
    files = [(folder / f"rollouts-rank{rank}.jsonl").open("w", encoding="utf-8") for rank in (0, 1)]
    with files[0], files[1], (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        for step in range(1, steps + 1):
            share = min(0.95, 0.1 + step / steps)
            metrics.write(
                json.dumps({"step": step, "reward/mean": share, "time/step_s": 1.5, "completions/length_mean": 100.0})
                + "\n"
            )
            for row in range(min(GROUP * GROUPS, completions - written)):
                written += 1
                line = _line(rng, step, row, share, characters)
                files[row % 2].write(json.dumps(line, ensure_ascii=False) + "\n")


def _line(rng: random.Random, step: int, row: int, share: float, characters: int) -> dict[str, object]:
    question = (step % PERIOD) * GROUPS + row // GROUP
    words = rng.choices(WORDS, k=max(1, int(rng.uniform(0.2, 1.8) * characters / 5)))
    right = float(rng.random() < share)
    return {
        "step": step,
        "row": row,
        "question": f"Question {question}: how many eggs are left of {question + 7}?",
        "gold": str(question),
        "completion": " ".join(words) + f"\n#### {question if right else question + 1}",
        "finish": "stop" if rng.random() < 0.95 else "length",
        "rewards": {"rewards.py:right": right, "rewards.py:short": round(rng.random(), 3)},
        "reward": right,
        "advantage": round(rng.gauss(0, 1), 4),
        "extracted": str(question),
        "length": len(words),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=600)
    args = parser.parse_args(argv)
    write_run(args.folder, args.completions, args.characters)


if __name__ == "__main__":
    main()
