"""A decode step against the length of what it reads: this engine beside transformers' generate with a static cache.

    python -m benchmarks.long_decode [--contexts 128 512 2048 8192 16384] [--rows 8] [--pairs 3] [--model FOLDER]
                                     [--vllm_python .venv-vllm/bin/python]      and beside vLLM

Without --model a random Qwen3 of 6M parameters (keys and values of a token: 7 kB). All rows have as many tokens before
the first draw; 33 are drawn. `own`: every row has a prompt of its own; `shared`: all rows have one prompt, as a group
has. Each measurement is a process of its own, sides in turn; milliseconds are the median of the 32 intervals between
two tokens. The floor is the bytes of weights, keys and values that a step has to read over the bandwidth that
benchmarks/floors.py measures in the same process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.workloads import SIX_MILLION, word_model

SIDES = ("ours own", "ours shared", "static own")
TOKENS = 33
WORDS = 2048


def measure(side: str, context: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, and its floor."""
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    from benchmarks import floors
    from grpo.models.loading import prepare
    from grpo.rollout import Request
    from grpo.rollout.engine import NativeEngine
    from grpo.rollout.sampling import Sampling

    torch.set_num_threads(args.threads)
    model = prepare(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
    vocabulary = min(WORDS, model.config.vocab_size)
    shared = side.endswith("shared")
    draw = torch.randint(1, vocabulary, (args.rows, context), generator=torch.Generator().manual_seed(0))
    prompts = draw[:1].expand(args.rows, -1) if shared else draw
    times: list[float] = []
    if side.startswith("ours"):
        engine = NativeEngine(model, [], TOKENS, seed=0)
        slots = [0 if shared else row for row in range(args.rows)]
        requests = [
            Request(row, slots[row], row if shared else 0, tuple(prompts[row].tolist())) for row in range(args.rows)
        ]
        engine.generate(requests, Sampling(1.0), on_tokens=lambda pairs: times.append(time.perf_counter()))
    else:

        class Clock(LogitsProcessor):
            def __call__(self, input_ids, scores):
                times.append(time.perf_counter())
                return scores

        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=True,
            cache_implementation="static",
            disable_compile=True,
            logits_processor=LogitsProcessorList([Clock()]),
        )
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    shape, ceilings = floors.shape_of(model), floors.measure(torch.device("cpu"), torch.float32)
    kept = shape.kept * context * (1 if shared else args.rows)
    read = (shape.body + shape.head + kept) * shape.width
    return {"ms": statistics.median(steps) * 1e3, "floor_ms": read / ceilings.bytes_per_s * 1e3}


def result(command: list[str]) -> dict[str, float]:
    """The JSON that a command prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a model folder")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192, 16_384])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm_python", help="the Python of vLLM's environment")
    parser.add_argument("--only", choices=SIDES, help="measure the first context once, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.contexts[0], args)))
        return
    with tempfile.TemporaryDirectory() as name:
        if args.model is None:
            word_model(Path(name), WORDS, **SIX_MILLION)
        folder = args.model or f"{name}/model"

        def once(side: str, context: int) -> dict[str, float]:
            if side.startswith("vllm"):
                kind = side.removeprefix("vllm ")
                command = [
                    args.vllm_python,
                    "-m",
                    "benchmarks.long_decode_vllm",
                    folder,
                    str(context),
                    str(args.rows),
                    kind,
                ]
                return result(command)
            words = ["--contexts", str(context), "--rows", str(args.rows), "--threads", str(args.threads)]
            command = [sys.executable, "-m", "benchmarks.long_decode", *words, "--model", folder, "--only", side]
            return result(command)

        sides = (*SIDES, *(("vllm own", "vllm shared") if args.vllm_python else ()))
        print("| context | " + " | ".join(sides) + " | static / ours own | own, x floor | shared, x floor |")
        print("| ---: |" + " ---: |" * (len(sides) + 3))
        for context in args.contexts:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for pair in range(args.pairs):
                for side in sides if pair % 2 == 0 else sides[::-1]:
                    found[side].append(once(side, context))
            middle = lambda side, key, found=found: statistics.median(run[key] for run in found[side])  # noqa: E731
            ratios = [a["ms"] / b["ms"] for a, b in zip(found["static own"], found["ours own"], strict=True)]
            cells = [f"{middle(side, 'ms'):.2f} ms" for side in sides]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
            cells += [f"{middle(side, 'ms') / middle(side, 'floor_ms'):.1f}" for side in SIDES[:2]]
            print(f"| {context:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
