"""What moving keys and values costs as rows leave and join: its share of a rollout's time.

    python -m benchmarks.cache_copies [--workloads heavy_tail long_completion] [--pairs 3]

Rollouts of the native engine; timed are all functions that copy a cache, or a part of it, as rows come and go
(grpo/rollout/row_buffer.py and shared_cache.py), but not the writing of new tokens. With a quarter of the rows at
once, rows join while others are decoded. Control: the same rollout with a copy of all keys and values whenever a row
leaves, as a buffer without gaps would need.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.workloads import make
from grpo.models.loading import prepare
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.row_buffer import RowBuffer
from grpo.rollout.sampling import Sampling
from grpo.rollout.shared_cache import SharedCache

COPIES = {
    RowBuffer: ("join", "copy_prompts", "grow", "keep"),
    SharedCache: ("_join_by_prompt", "_copy_prompts_if_faster"),
}


class Clock:
    """Seconds inside the copying functions, the outermost of them."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0
        for owner, names in COPIES.items():
            for name in names:
                setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, function):
        """The function, with its time taken."""

        def wrapper(*args, **kwargs):
            self.depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return wrapper


def copy_all(keep):
    """The control: `keep` that copies every row that stays."""

    def wrapper(self, rows):
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = (keys.clone(), values.clone())
        return keep(self, rows)

    return wrapper


def main() -> None:
    """Roll out, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", default=["heavy_tail", "long_completion"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--max_new", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = RowBuffer.keep
    clock = Clock()
    for name in args.workloads:
        with tempfile.TemporaryDirectory() as folder:
            work = make(name, Path(folder))
            model = prepare(AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32))
            tokenizer = AutoTokenizer.from_pretrained(work.model)
        lines = [f"w{n}" for n in range(5, 45)]
        limit = min(work.max_new, args.max_new)
        places = [(p, g) for p in range(work.prompts) for g in range(work.group)]
        texts = [tuple(tokenizer(" ".join(lines[p:] + lines[:p]))["input_ids"]) for p in range(work.prompts)]
        requests = [Request(n, p, g, texts[p]) for n, (p, g) in enumerate(places)]
        for at_once in (len(requests), len(requests) // 4):
            shares: dict[str, list[float]] = {"ours": [], "control": []}
            for turn in range(args.pairs + 1):
                for which in shares:
                    RowBuffer.keep = clock.timed(plain if which == "ours" else copy_all(plain))
                    most = at_once * (limit + max(map(len, texts)))
                    engine = NativeEngine(model, [0], limit, turn, max_tokens=most, num_tokens=len(tokenizer))
                    clock.seconds, began = 0.0, time.perf_counter()
                    engine.generate(requests, Sampling())
                    if turn:
                        shares[which].append(clock.seconds / (time.perf_counter() - began))
            both = ", ".join(f"{which} {100 * statistics.median(found):.2f} %" for which, found in shares.items())
            print(
                f"{name}, {len(requests)} rows of up to {limit} tokens, {at_once} at once: copies take {both}",
                flush=True,
            )


if __name__ == "__main__":
    main()
