"""What a variation of the algorithm costs: a step with it over a step of plain grpo, on the same completions.

    python -m benchmarks.preset_cost                                        the demo, two threads
    python -m benchmarks.preset_cost --model FILE.gguf --data openai/gsm8k  SmolLM2-135M on GSM8K's prompts

One process samples a step once (`rollout_s`). Then grpo and the variation take turns, who goes first alternating:
advantages, plan, delivery, old log-probs, the update, at a learning rate that leaves every fp32 weight as it is. The
ratio is that of whole steps, rollout_s plus the rest; medians of the pairs' ratios. The control is grpo against itself.
Where the variation records something while it samples, both sample in every turn, the same tokens.
Variations that choose groups do the same work for each group and differ in what they sample, so they are not here.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from grpo.config.algorithm import PRESETS
from grpo.config.command_line import load_config
from grpo.config.settings import Config

KEEP = {"filter_groups": "keep"}
CASES: dict[str, dict[str, object]] = {
    "grpo again (control)": {},
    **{name: {**preset, **KEEP} for name, preset in PRESETS.items() if name != "grpo"},
    "entropy bonus": {"entropy_coef": 0.01},
    "adaptive entropy": {"entropy_target": 1.0},
    "top entropies": {"top_entropy_share": 0.2},
    "off-policy rows": {"off_policy_threshold": 1.0},
}
DEMO = ["--config", "configs/demo.yaml"]
REAL = ["--answer_format", "hash", "--batch_size", "2"]
REAL += ["--gradient_accumulation_steps", "1", "--num_generations", "8", "--max_generate_length", "96"]
REAL += ["--rewards", '{"correctness_reward": 1.0}']


def settings(words: Sequence[str], folder: Path, threads: int, **more: object) -> Config:
    """The configuration of a case."""
    given = {"lr": 1e-12, "num_threads": threads, "device": "cpu", "report_to": "none", **more}
    places = ["--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs"]
    argv = [word for name, value in given.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    return load_config([*words, *places, *argv])[0]


def measure(words: Sequence[str], cases: Sequence[str], pairs: int, threads: int, folder: Path) -> None:
    """Print a line for each case."""
    import numpy as np

    from grpo.models.checks import stop_token_ids
    from grpo.rollout import rollout
    from grpo.rollout.engine import NativeEngine
    from grpo.rollout.sampling import sampling_of
    from grpo.run.task import load_task
    from grpo.runtime.distributed import start
    from grpo.training.exchange import deliver
    from grpo.training.load_policy import load_policy
    from grpo.training.metrics import Tally
    from grpo.training.minibatches import make_plan
    from grpo.training.policy import Policy
    from grpo.training.scoring import advantages_of
    from grpo.types import FACTS, Completion, Table

    plain = settings(words, folder, threads)
    world = start("cpu", threads)
    task = load_task(plain)
    policy = load_policy(plain, world)
    stops = stop_token_ids(policy.model, task.tokenizer, task.recipe.end_of_turn, print)
    engine = NativeEngine.of(plain, policy.model, stops, policy.num_tokens, task.tokenizer)
    prompts = task.questions.prompts(0, plain.batch_size * plain.gradient_accumulation_steps)

    def sample(cfg: Config) -> tuple[list[Completion], float]:
        began = time.monotonic()
        completions = rollout(engine, prompts, range(len(prompts)), cfg, world)
        return sorted(completions, key=lambda one: one.row), time.monotonic() - began

    rollout_s = statistics.median(sample(plain)[1] for _ in range(3))
    # half of each group is right: every row carries gradient
    sampled, _ = sample(plain)
    lengths = np.array([len(one.token_ids) for one in sampled], dtype=np.float64)
    rewards = np.arange(len(sampled)) % 2 + 0.1 * (np.arange(len(sampled)) % 3)
    facts = {name: np.zeros(len(lengths)) for name in FACTS} | {"length": lengths, "trained": lengths}
    table = Table(["r"], rewards[:, None], rewards, facts, plain.num_generations, reward_weights=(1.0,))

    def step(cfg: Config, policy: Policy, samples: bool) -> tuple[float, float]:
        """Seconds of the rollout and of the rest of a step."""
        completions, seconds = sample(cfg) if samples else (sampled, rollout_s)
        assert [len(one.token_ids) for one in completions] == lengths.tolist()
        policy.cfg = policy.scorer.cfg = cfg
        began = time.monotonic()
        gains = advantages_of(table, cfg)
        plan = make_plan(cfg, prompts, table.lengths, gains, 1, policy.scorer.shares_prompts, table.num_trained)
        batches = policy.annotate(deliver(world, cfg, plan, prompts, completions, table, gains))
        policy.train_on(batches, Tally(), 10, False, lambda *skipped: sys.exit("an update was skipped"))
        return seconds, time.monotonic() - began

    print(f"rollout {rollout_s:.2f} s, {int(lengths.sum())} tokens in {len(lengths)} completions", flush=True)
    for case in cases:
        other = settings(words, folder, threads, **CASES[case])
        theirs = load_policy(other, world)
        theirs.counters.trust_sampler = policy.counters.trust_sampler = True
        samples = sampling_of(other) != sampling_of(plain)
        step(plain, policy, samples), step(other, theirs, samples)
        ratios, updates = [], []
        for pair in range(pairs):
            turns = [(plain, policy), (other, theirs)]
            seconds = {id(turn[1]): step(*turn, samples) for turn in (turns if pair % 2 else turns[::-1])}
            ours, base = seconds[id(theirs)], seconds[id(policy)]
            ratios.append(sum(ours) / sum(base))
            updates.append(ours[1] / base[1])
        print(
            f"{case}: step {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f}), "
            f"without the rollout {statistics.median(updates):.3f}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model in place of the demo")
    parser.add_argument("--data", help="with --model: its questions, GSM8K or a file of the same columns")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    words = DEMO if args.model is None else ["--model", args.model, "--data", args.data, *REAL]
    with tempfile.TemporaryDirectory() as folder:
        measure(words, args.cases, args.pairs, args.threads, Path(folder))


if __name__ == "__main__":
    main()
