"""The update on long completions: time and memory as completions grow, beside transformers' own rows.

    python -m benchmarks.long_update                                     256 to 8,192 tokens, ours and plain, one thread
    python -m benchmarks.long_update --lengths 4096 --pairs 5            what RESULTS.md says of 4,096 tokens

One optimizer step on four completions of one prompt of 128 tokens, equal lengths, on a random Qwen3 of 6M parameters.

    ours   make_plan, deliver and Policy.train_on with the default settings
    plain  transformers' forward and backward of the same rows, one at a time, logits of the completion only,
           log_softmax, the same loss, clipping, AdamW

Each measurement is a process of its own, sides in turn. Seconds are CPU seconds of all threads; of ours also those
outside our attention kernels, which grow with the square of the length; where rows are padded, because a flat row would
spare too little, attention is transformers' own and is not left out. Memory is the highest resident size above
the same process after a step of 16 tokens, when weights, gradients and moments are in memory. The slope is that of log
against log, least squares, over the upper half of the lengths and over all: 1 is linear, 2 quadratic.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workloads import SIX_MILLION, word_model

SIDES = ("ours", "plain")
PROMPT, GROUP, WORDS = 128, 4, 2048


def resident_mb(which: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def rows(length: int):
    """The prompt, and the completions [GROUP, length], each with an advantage."""
    import numpy as np

    generator = np.random.default_rng(length)
    draw = lambda *shape: generator.integers(1, WORDS, shape, dtype=np.int32)  # noqa: E731
    return draw(PROMPT), draw(GROUP, length), np.array([1.5, -0.5, -0.5, -0.5])


def ours(folder: Path, threads: int):
    """A function that takes one step on completions of a length."""
    import numpy as np

    from grpo.config.settings import Config
    from grpo.models.checks import load_model
    from grpo.runtime.distributed import start
    from grpo.training.exchange import deliver
    from grpo.training.metrics import Tally
    from grpo.training.minibatches import make_plan
    from grpo.training.policy import Policy
    from grpo.types import Completion, Prompt, Table

    cfg = Config(model=str(folder), batch_size=1, gradient_accumulation_steps=1, num_generations=GROUP, lr=1e-12)
    world = start("cpu", threads)
    policy = Policy(cfg, world, load_model(str(folder), world.device))

    def step(length: int) -> None:
        prompt, completions, gains = rows(length)
        lengths = np.full(GROUP, length)
        table = Table([], np.zeros((GROUP, 0)), np.zeros(GROUP), {"length": lengths, "trained": lengths}, GROUP)
        prompts = [Prompt(0, "", tuple(prompt.tolist()), {})]
        sampled = [Completion(n, ids, np.zeros(length, np.float32), "stop") for n, ids in enumerate(completions)]
        plan = make_plan(cfg, prompts, lengths, gains, 1, policy.scorer.shares_prompts)
        batches = policy.annotate(deliver(world, cfg, plan, prompts, sampled, table, gains))
        tally = Tally()
        policy.train_on(batches, tally, 10, False, lambda *skipped: sys.exit("an update was skipped"))

    return step


def plain(folder: Path, threads: int):
    """As `ours`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def step(length: int) -> None:
        prompt, completions, gains = rows(length)
        for ids, gain in zip(completions, gains, strict=True):
            row = torch.cat([torch.from_numpy(prompt), torch.from_numpy(ids)]).long()[None]
            logits = model(input_ids=row, use_cache=False, logits_to_keep=length + 1).logits[0, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, row[0, PROMPT:, None])[:, 0]
            (-(logprobs - logprobs.detach()).exp() * gain / (GROUP * length)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def measure(side: str, length: int, folder: Path, threads: int) -> dict[str, float]:
    """One measurement, in this process."""
    step = {"ours": ours, "plain": plain}[side](folder, threads)
    step(16)
    attention = [0.0]
    if side == "ours":
        from grpo.forward.attention_kernels import CpuFlash

        def timed(function):
            def call(*args):
                start = time.process_time()
                result = function(*args)
                attention[0] += time.process_time() - start
                return result

            return call

        CpuFlash.forward, CpuFlash.backward = timed(CpuFlash.forward), timed(CpuFlash.backward)
    Path("/proc/self/clear_refs").write_text("5")
    idle, start = resident_mb("VmRSS"), time.process_time()
    step(length)
    seconds = time.process_time() - start
    return {"s": seconds, "rest_s": seconds - attention[0], "mb": resident_mb("VmHWM") - idle}


def slope(lengths: list[int], values: list[float]) -> float:
    """Of log against log, least squares.

    >>> round(slope([1, 2, 4], [3.0, 6.0, 12.0]), 6)
    1.0
    """
    x, y = [math.log(n) for n in lengths], [math.log(max(v, 1e-9)) for v in values]
    middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs=2, metavar=("SIDE", "FOLDER"), help="measure one length once, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only[0], args.lengths[0], Path(args.only[1]), args.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        word_model(Path(name), WORDS, **SIX_MILLION)

        def once(side: str, length: int) -> dict[str, float]:
            words = ["--lengths", str(length), "--threads", str(args.threads), "--only", side, f"{name}/model"]
            command = [sys.executable, "-m", "benchmarks.long_update", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            return json.loads(done.stdout.splitlines()[-1])

        middle: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
        print("| tokens | " + " | ".join(args.sides) + " | ours / plain, seconds | memory |")
        print("| ---: |" + " ---: |" * (len(args.sides) + 2))
        for length in args.lengths:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
            for pair in range(args.pairs):
                for side in args.sides if pair % 2 == 0 else args.sides[::-1]:
                    found[side].append(once(side, length))
            for side, runs in found.items():
                middle[side].append({key: statistics.median(run[key] for run in runs) for key in runs[0]})
            cells = [f"{m[-1]['s']:.2f} s, {m[-1]['mb']:.0f} MB" for m in middle.values()]
            if set(SIDES) <= set(args.sides):
                ratios = [a["s"] / b["s"] for a, b in zip(found["ours"], found["plain"], strict=True)]
                memory = middle["ours"][-1]["mb"] / middle["plain"][-1]["mb"]
                cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})", f"{memory:.2f}"]
            print(f"| {length:,} | " + " | ".join(cells) + " |", flush=True)
    if len(args.lengths) < 3:
        return
    upper = len(args.lengths) // 2
    for side, points in middle.items():
        for key, what in (("s", "seconds"), ("rest_s", "seconds without attention"), ("mb", "memory")):
            values = [point[key] for point in points]
            both = slope(args.lengths[upper:], values[upper:]), slope(args.lengths, values)
            if side == "ours" or key != "rest_s":
                print(f"{side}: slope of {what} {both[0]:.2f} in the upper half, {both[1]:.2f} over all")


if __name__ == "__main__":
    main()
