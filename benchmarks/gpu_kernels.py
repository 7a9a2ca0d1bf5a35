"""Parts of benchmarks/gpu_check.py that call a kernel or a model themselves, without a run of train.py."""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.workloads import QWEN3_06B

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
HEADS = {"Qwen3-0.6B": (16, 8, 128), "SmolLM2": (9, 3, 64), "the demo": (4, 2, 64)}

Say = Callable[[dict[str, Any]], None]


def said_by(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, " ".join(dict.fromkeys(str(warning.message) for warning in caught))


def attention(args: argparse.Namespace, say: Say, dtype: str) -> None:
    """The kernels that are used; then ours beside torch's own over rows, forward and backward."""
    from benchmarks.attention import measure
    from grpo.forward.fused_attention import difference, fused_kernel

    device, kind = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    without = []
    for model, heads in HEADS.items():
        kernel, warned = said_by(lambda heads=heads: fused_kernel(device, kind, *heads))
        if kernel is None:
            without.append(model)
            say({f"heads of {model}": f"scores in memory, no fused kernel: {warned}"})
        else:
            gap = difference(kernel, device, kind, *heads)
            say({f"heads of {model}": f"fused kernel {type(kernel).__name__}, difference {gap:.1e}"})
    cases = ["8x8x512x512", "2x8x512x2048", "1x8x512x4096", "1x4x512x16384"] if args.on_gpu else ["2x2x8x16"]
    heads, kv, width = HEADS["Qwen3-0.6B"] if args.on_gpu else (4, 2, 8)
    shape = argparse.Namespace(
        device=args.device, dtype=dtype, heads=heads, kv=kv, width=width, threads=torch.get_num_threads(), window=None
    )
    for case in cases:
        groups, completions, prompt, length = sizes = tuple(map(int, case.split("x")))
        pairs = groups * (prompt**2 / 2 + completions * (length**2 / 2 + length * prompt))
        flops = 3.5 * 4 * pairs * heads * width  # forward 2 products, backward 5
        ours, rows = (measure(side, sizes, shape) for side in ("ours", "repeated"))
        found = {side: [round(1e3 * one["s"], 2), round(one["mb"])] for side, one in (("ours", ours), ("rows", rows))}
        found["s ours/rows"] = round(ours["s"] / max(rows["s"], 1e-9), 2)
        say({f"{case} ms, MB": found | {"TFLOP/s": round(flops / max(ours["s"], 1e-9) / 1e12, 1)}})
    if without:
        raise RuntimeError(f"no fused kernel for the heads of {', '.join(without)}: scores in memory")


def gradients(args: argparse.Namespace, say: Say) -> None:
    """Relative distance of gradients from those of the CPU in fp32."""
    import numpy as np
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo.config.settings import Config
    from grpo.forward import logprobs
    from grpo.models.loading import prepare
    from grpo.training.collate import collate
    from grpo.types import TrainRow

    torch.manual_seed(0)
    length = 700 if args.on_gpu else 40
    config = Qwen3Config(**(SMALL | {"head_dim": 64}), vocab_size=512, max_position_embeddings=4096)
    weights = Qwen3ForCausalLM(config).state_dict()
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 512, 90).tolist()) for _ in range(2)]
    rows = []
    for n in range(8):
        ids = rng.integers(0, 512, length - length // 8 * (n % 4)).astype(np.int32)
        zeros = np.zeros(len(ids), np.float32)
        rows.append(TrainRow(n, prompts[n // 4], ids, zeros, None, float(rng.normal())))

    def gradient(device: str, dtype: str, shares: bool) -> torch.Tensor:
        model = Qwen3ForCausalLM(config)
        model.load_state_dict(weights)
        scorer = logprobs.Scorer(prepare(model.to(device)), Config(model="none", dtype=dtype))
        assert scorer.shares_prompts, "the check of shared prompts failed"
        scorer.shares_prompts = shares
        micro = collate(rows, {row.row: 1.0 for row in rows}, torch.device(device))
        (scorer(micro) * micro.advantages[:, None] * micro.trained).sum().backward()
        return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])

    logprobs.FLAT_BELOW = 10.0
    exact, far = gradient("cpu", "fp32", False), []
    for dtype, limit in (("fp32", 1e-3), ("bf16", 0.1)):
        for shares in (True, False):
            gap = float((gradient(args.device, dtype, shares) - exact).norm() / exact.norm())
            say({f"{dtype} {'shared' if shares else 'rows'}": round(gap, 7)})
            far += [] if gap < limit else [f"{dtype}: {gap:.1e}, above {limit}"]
    if far:
        raise RuntimeError("; ".join(far))


def graphs(args: argparse.Namespace, say: Say) -> None:
    """Seconds of a rollout with CUDA graphs and without."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo.models.loading import prepare
    from grpo.rollout import Request
    from grpo.rollout.engine import NativeEngine
    from grpo.rollout.sampling import Sampling

    vocabulary, new, count, longest = (151_936, 128, 16, 256) if args.on_gpu else (96, 8, 2, 12)
    torch.manual_seed(0)
    body = QWEN3_06B if args.on_gpu else SMALL
    config = Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=16_384, **body)
    with torch.device(args.device):
        model = prepare(Qwen3ForCausalLM(config))
    prompts = [tuple(range(p + 1, p + 1 + longest - p)) for p in range(count)]
    requests = [Request(8 * p + g, p, g, prompts[p]) for p in range(count) for g in range(8)]
    samples, problem = {}, ""
    for on in (True, False):
        engine, warned = said_by(
            lambda on=on: NativeEngine(model, {0}, new, 3, "bf16" if args.on_gpu else "fp32", None, on)
        )
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            made, more = said_by(lambda engine=engine: engine.generate(requests, Sampling()))
            seconds, warned = time.perf_counter() - start, warned + more  # tokens are on the host: the device is done
        samples[on] = [tuple(one.token_ids) for one in made]
        tokens = sum(map(len, samples[on]))
        found = {"s": round(seconds, 3), "tokens/s": round(tokens / seconds)}
        if on and args.on_gpu:
            found["replays"] = engine.graph.replays if engine.graph else 0
            problem = "" if found["replays"] and engine.graph.usable else f"no graph was replayed: {warned}"
        say({"with graphs" if on else "without": found})
    alike = statistics.mean(a[:8] == b[:8] for a, b in zip(samples[True], samples[False], strict=True))
    say({"first 8 tokens alike": round(alike, 3)})
    if problem:
        raise RuntimeError(problem)
