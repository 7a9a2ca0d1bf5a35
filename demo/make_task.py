"""Write the demo's word problems: demo/train.jsonl and demo/test.jsonl, in GSM8K's format.

A question strings four to six small changes together; the answer replays them one at a time:

    Mia has 7 pears. She buys 3, eats 2, finds 4 and sells 5. How many pears does she have now?
    7, buys 3: 10, eats 2: 8, finds 4: 12, sells 5: 7.
    #### 7

Each change is easy; doing all of them in one's head is not. So working it out pays.

Train and held-out questions cannot overlap: a question belongs to the held-out side when a hash of
its text says so (`is_held_out`), and every generator of training rows, the base model's teacher
included, rejects such questions.

    python demo/make_task.py
"""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

NAMES = {"Mia": "She", "Ana": "She", "Zoe": "She", "Lily": "She", "Tom": "He", "Ben": "He", "Max": "He", "Sam": "He"}
ITEMS = ["pears", "coins", "books", "cards", "shells", "eggs", "stamps", "marbles"]
CHANGES = {
    **{verb: +1 for verb in ("buys", "finds", "gets", "wins", "picks", "earns")},
    **{verb: -1 for verb in ("eats", "sells", "loses", "drops", "gives", "uses")},
}
MAX_TOTAL = 20  # totals stay within 0 … 20, so that each single step is easy
MIN_EVENTS, MAX_EVENTS = 4, 6
TRAIN_ROWS, TEST_ROWS = 2000, 256


def is_held_out(question: str) -> bool:
    """Say whether a question belongs to the held-out side: one in sixteen, by a hash of its text.

    >>> is_held_out("2+2?") == is_held_out("2+2?")
    True
    """
    return hashlib.sha256(question.encode()).digest()[0] % 16 == 0


def make_problem(rng: random.Random) -> dict[str, str]:
    """Draw one problem: {"question", "answer"}, the answer ending in `#### total`."""
    name = rng.choice(sorted(NAMES))
    item = rng.choice(ITEMS)
    total = rng.randint(2, 9)
    events: list[str] = []
    steps = [str(total)]
    start = total
    verbs = rng.sample(sorted(CHANGES), len(CHANGES))
    num_events = rng.randint(MIN_EVENTS, MAX_EVENTS)
    for verb in verbs:  # each verb once, so that a step of the answer names its event
        amount = rng.randint(1, 9)
        if not 0 <= total + CHANGES[verb] * amount <= MAX_TOTAL:
            continue
        total += CHANGES[verb] * amount
        events.append(f"{verb} {amount}")
        steps.append(f"{verb} {amount}: {total}")
        if len(events) == num_events:
            break
    if len(events) < MIN_EVENTS:  # the totals left no room: draw again
        return make_problem(rng)
    told = ", ".join(events[:-1]) + " and " + events[-1]
    question = f"{name} has {start} {item}. {NAMES[name]} {told}. How many {item} does {NAMES[name].lower()} have now?"
    return {"question": question, "answer": ", ".join(steps) + f".\n#### {total}"}


def problems(seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """Yield distinct problems of one side, for ever, as a function of the seed."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = make_problem(rng)
        if is_held_out(problem["question"]) == held_out and problem["question"] not in seen:
            seen.add(problem["question"])
            yield problem


def write_jsonl(path: Path, rows: Iterator[dict[str, str]], count: int) -> None:
    """Write the first `count` rows, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for _, row in zip(range(count), rows, strict=False):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    write_jsonl(here / "train.jsonl", problems(seed=1, held_out=False), TRAIN_ROWS)
    write_jsonl(here / "test.jsonl", problems(seed=2, held_out=True), TEST_ROWS)
    print(f"wrote {TRAIN_ROWS} train and {TEST_ROWS} held-out questions to {here}")
