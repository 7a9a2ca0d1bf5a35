"""Write the word problems of the real model: demo/real_model/train.jsonl and test.jsonl.

    Tom has 9 coins and buys 17 more. How many coins does Tom have now?       26
    Mia has 15 eggs and gives away 8. How many eggs does Mia have now?         7

One sum or difference, numbers to 20. A question is held out
when a hash of its text says so (`is_held_out` in demo/make_task.py), so the two files cannot overlap.

    python demo/real_model/make_questions.py
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo.make_task import is_held_out, write_jsonl

NAMES = ["Ana", "Ben", "Lily", "Max", "Mia", "Noah", "Sam", "Tom", "Zoe", "Leo", "Eva", "Kim"]
ITEMS = ["apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "toys"]
GAINS = ["buys {} more", "finds {} more", "gets {} more", "wins {} more"]
LOSSES = ["gives away {}", "loses {}", "sells {}", "uses {}"]
LARGEST = 20
TRAIN_ROWS, TEST_ROWS = 1000, 512


def questions(seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """Yield distinct questions of one side, for ever, as a function of the seed."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        name, item = rng.choice(NAMES), rng.choice(ITEMS)
        first, second = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
        if rng.random() < 0.5:
            change, total = rng.choice(GAINS), first + second
        else:
            first, second = max(first, second), min(first, second)
            change, total = rng.choice(LOSSES), first - second
        text = f"{name} has {first} {item} and {change.format(second)}. How many {item} does {name} have now?"
        if is_held_out(text) == held_out and text not in seen:
            seen.add(text)
            yield {"question": text, "answer": str(total)}


if __name__ == "__main__":
    here = Path(__file__).parent
    write_jsonl(here / "train.jsonl", questions(seed=1, held_out=False), TRAIN_ROWS)
    write_jsonl(here / "test.jsonl", questions(seed=2, held_out=True), TEST_ROWS)
    print(f"wrote {TRAIN_ROWS} train and {TEST_ROWS} held-out questions to {here}")
