"""Rewards called while other completions are sampled, against all at the end: what a rollout and its scores take.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --rows 128 --pairs 9 --threads 2

A small random model samples completions of very different lengths, on one thread; two reward workers. Three rewards:
the demo's, which costs next to nothing; one that waits 20 ms a row, as one that asks a service does; one that computes
for 20 ms. Both ways in turn, first each once, uncounted; the control is that all scores are bit-equal. Beside it what a
token pays: the pulse, with nothing to do and with a worker busy.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3Config

from grpo.config.settings import Config
from grpo.models.loading import load_tokenizer, prepare
from grpo.rewards import pool as pool_module
from grpo.rewards.pool import Rewards, open_rewards
from grpo.rollout import rollout
from grpo.rollout.engine import NativeEngine
from grpo.runtime.distributed import World
from grpo.training.scoring import Scored, Scoring
from grpo.types import Prompt

GROUP = 8
REWARDS = """
import time


def waits_reward(completions, **columns):
    time.sleep(0.02)
    return [len(text) for text in completions]


def computes_reward(completions, **columns):
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    return [len(text) for text in completions]
"""


def engine_of(vocab: int, max_new: int) -> NativeEngine:
    """A random model of 5M parameters, most of whose completions end by chance, one token in sixty."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    return NativeEngine(model, range(0, vocab, 60), max_new, seed=0)


class Side:
    """One reward, scored both ways."""

    def __init__(self, rewards: Rewards, engine: NativeEngine, cfg: Config, tokenizer: PreTrainedTokenizerBase):
        self.rewards, self.engine, self.cfg, self.tokenizer = rewards, engine, cfg, tokenizer
        self.world = World(0, 1, 0, 1, torch.device("cpu"))

    def run(self, step: int, early: bool) -> tuple[float, float, Scored]:
        """Seconds of rollout and scores together, of the scores after the rollout, and what they are."""
        count = self.cfg.rollout_chunk_rows // GROUP
        prompts = [Prompt(p, f"q{p}", tuple(range(9 + p, 29 + p)), {"answer": "4"}) for p in range(count)]
        start_s = time.perf_counter()
        scoring = Scoring(self.cfg, self.rewards, prompts, self.tokenizer, print)
        completions = rollout(self.engine, prompts, step, self.cfg, self.world, scoring if early else None)
        sampled_s = time.perf_counter()
        scored = scoring.finish(completions)
        return time.perf_counter() - start_s, time.perf_counter() - sampled_s, scored


def compare(name: str, side: Side, pairs: int) -> None:
    taken: dict[bool, list[float]] = {False: [], True: []}
    after: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs + 1):
        scored = {}
        for early in (False, True) if pair % 2 else (True, False):
            took_s, after_s, scored[early] = side.run(pair, early)
            if pair:
                taken[early].append(took_s)
                after[early].append(after_s)
        np.testing.assert_array_equal(scored[True].scores, scored[False].scores)
    ratios = [late / soon for late, soon in zip(taken[False], taken[True], strict=True)]
    lengths = [len(one.token_ids) for one in scored[True].completions]
    shown = [f"{statistics.median(taken[e]):.3f} ({statistics.median(after[e]):.3f})" for e in (False, True)]
    print(
        f"| {name} | {len(lengths)} of {min(lengths)} to {max(lengths)} | {shown[0]} | {shown[1]} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |",
        flush=True,
    )


def pulse_ns(side: Side, busy: bool, calls: int = 20000) -> float:
    """Nanoseconds of one pulse, with nothing to do or while a worker sleeps."""
    scoring = Scoring(side.cfg, side.rewards, [Prompt(0, "q", (1,), {})], side.tokenizer, print)
    if busy:
        scoring.take(side.run(0, early=False)[2].completions[:1])
    start_s = time.perf_counter()
    for _ in range(calls):
        scoring.pulse()
    return (time.perf_counter() - start_s) / calls * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pool_module.EARLY_S, pool_module.MEASURED_ROUNDS = 0.0, 10**9  # early from the first round on, always
    tokenizer = load_tokenizer("demo/base")
    engine = engine_of(len(tokenizer), args.max_new_tokens)
    print("| reward | completions | s at the end (of it scoring) | s early (of it scoring) | end / early |")
    print("| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "mine.py"
        file.write_text(REWARDS, encoding="utf-8")
        for name in ("final_answer_reward", f"{file}:waits_reward", f"{file}:computes_reward"):
            cfg = Config(
                rewards={name: 1.0},
                num_generations=GROUP,
                rollout_chunk_rows=args.rows,
                max_generate_length=args.max_new_tokens,
            )
            rewards = stack.enter_context(contextlib.closing(open_rewards(cfg, print)))
            side = Side(rewards, engine, cfg, tokenizer)
            compare(name.rpartition(":")[2], side, args.pairs)
        idle, busy = pulse_ns(side, busy=False), pulse_ns(side, busy=True)
    print(f"a pulse: {idle:.0f} ns with nothing to do, {busy:.0f} ns while a worker is busy")


if __name__ == "__main__":
    main()
