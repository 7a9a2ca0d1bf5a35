"""Attention of the update alone: completions after a shared prompt, forward and backward, time and memory.

    python -m benchmarks.attention                             on CPU, one thread, the table of RESULTS.md
    python -m benchmarks.attention --device cuda --dtype bf16 --cases 1x8x512x4096
    python -m benchmarks.attention --window 512                a sliding window, as Gemma 3 has it
    python -m benchmarks.attention --cases 1x4x128x256         groups x completions x prompt x tokens of a completion

    ours      the flat row through grpo.forward.shared_attention
    repeated  torch's own scaled_dot_product_attention over rows, the prompt repeated in each
    scores    ours as it is where no fused kernel fits: scores in memory (grpo.forward.branch_attention)

Every measurement is a process of its own, sides in turn. Time is CPU seconds of all threads, or on CUDA the device's
own; memory is the highest resident size above an idle process with the same tensors, or on CUDA what was allocated.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CASES = ["1x4x128x256", "1x4x128x1024", "1x4x128x4096", "1x8x1024x256", "8x8x96x40"]
SIDES = ("ours", "repeated", "scores")


def tensors(case: tuple[int, ...], args: argparse.Namespace, device, dtype):
    """Queries, keys, values and the gradient of the flat row [1, heads, tokens, width]."""
    import torch

    groups, completions, prompt, length = case
    tokens = groups * (prompt + completions * length)
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(1, tokens, heads, args.width, generator=generator)  # noqa: E731
    found = [draw(heads).to(device, dtype).transpose(1, 2) for heads in (args.heads, args.kv, args.kv)]
    return *(tensor.detach().requires_grad_() for tensor in found), draw(args.heads).to(device, dtype)


def sides(case: tuple[int, ...], device, window: int | None):
    """Functions from query, key, value to the result [1, tokens, heads, width]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from grpo.forward import shared_attention
    from grpo.forward.shared_attention import PromptGroup, SharedPrompts

    groups, completions, prompt, length = case
    shared_prompts = SharedPrompts([PromptGroup(prompt, (length,) * completions)] * groups, device)
    start = groups * prompt

    def ours(query, key, value):
        return shared_prompts.attend(0, query, key, value, query.shape[-1] ** -0.5, window)

    def scores(query, key, value):
        shared_attention.fused_kernel = lambda *shape: None
        return ours(query, key, value)

    def repeated(query, key, value):
        def rows(flat):  # [1, H, S, d] -> [groups * completions, H, prompt + length, d]
            prompts = flat[0, :, :start].unflatten(1, (groups, 1, prompt)).expand(-1, -1, completions, -1, -1)
            own = flat[0, :, start:].unflatten(1, (groups, completions, length))
            return torch.cat([prompts, own], 3).flatten(1, 2).transpose(0, 1)

        heads = query.shape[1] // key.shape[1]
        queries, keys, values = map(rows, (query, key, value))
        if queries.is_cuda and queries.dtype == torch.float32:  # no fused kernel there takes grouped heads
            keys, values, heads = keys.repeat_interleave(heads, 1), values.repeat_interleave(heads, 1), 1
        mask = None
        if window is not None and window < prompt + length:  # as transformers builds it, once for all layers
            place = torch.arange(prompt + length, device=device)
            distance = place[:, None] - place
            mask = (distance >= 0) & (distance < window)
        causal = mask is None
        out = scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, enable_gqa=heads > 1)
        out = out.transpose(0, 1).unflatten(1, (groups, completions))  # [H, groups, completions, prompt + length, d]
        prompts, own = out[:, :, 0, :prompt].flatten(1, 2), out[:, :, :, prompt:].flatten(1, 3)
        return torch.cat([prompts, own], 1).transpose(0, 1)[None]

    return {"ours": ours, "repeated": repeated, "scores": scores}


def measure(side: str, case: tuple[int, ...], args: argparse.Namespace) -> dict[str, float]:
    """One measurement, in this process; `gap`: relative difference of result and gradients from `repeated` in fp64."""
    import torch

    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    on_cuda = device.type == "cuda"

    def once(side, inputs, gradient):
        out = sides(case, device, args.window)[side](*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    small = (1, 2, 3, 4)
    *inputs, gradient = tensors(small, args, device, dtype)
    sides_of_small = sides(small, device, args.window)
    torch.autograd.grad(sides_of_small[side if side in SIDES else "ours"](*inputs), inputs, gradient)  # warm
    *inputs, gradient = tensors(case, args, device, dtype)
    if side == "idle":
        grads = [torch.ones_like(tensor) for tensor in (gradient, *inputs)]  # result and gradients of every side
        return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "s": float(len(grads))}
    if side == "gap":
        exact = once("repeated", [t.detach().double().requires_grad_() for t in inputs], gradient.double())
        return {
            name: max(float((a - b).norm() / b.norm()) for a, b in zip(once(name, inputs, gradient), exact))
            for name in ("ours", "repeated")
        }
    if on_cuda:
        way = sides(case, device, args.window)[side]
        run = lambda: torch.autograd.grad(way(*inputs), inputs, gradient)  # noqa: E731
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        for event in events:
            event.record()
            run()
        torch.cuda.synchronize()
        return {"mb": mb, "s": statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1e3}
    start = time.process_time()
    once(side, inputs, gradient)
    return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "s": time.process_time() - start}


def in_fresh_process(side: str, case: str) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:], "--only", side, "--cases", case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv", type=int, default=8, help="key heads")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--window", type=int, help="how many of the last tokens a token sees")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--only", choices=["idle", "gap", *SIDES], help="measure once, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, tuple(map(int, args.cases[0].split("x"))), args)))
        return
    names = ["groups x completions x prompt x tokens", *args.sides, "seconds, ours / repeated", "memory"]
    print("| " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * (len(args.sides) + 2))
    for case in args.cases:
        idle = 0.0 if args.device != "cpu" else in_fresh_process("idle", case)["mb"]
        found: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
        for pair in range(args.pairs):
            for side in args.sides if pair % 2 == 0 else args.sides[::-1]:
                found[side].append(in_fresh_process(side, case))
        middle = {
            side: (statistics.median(m["s"] for m in rows), statistics.median(m["mb"] for m in rows) - idle)
            for side, rows in found.items()
        }
        cells = [f"{s:.3g} s, {mb:.0f} MB" for s, mb in middle.values()]
        if {"ours", "repeated"} <= set(args.sides):
            ratios = [a["s"] / b["s"] for a, b in zip(found["ours"], found["repeated"], strict=True)]
            memory = middle["ours"][1] / max(middle["repeated"][1], 1)
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})", f"{memory:.2f}"]
        print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
