"""Peak memory and time of the chunked head against whole logits, forward and backward, on the CPU.

    python benchmarks/head_memory.py [--pairs 5] [--chunk_mb 256] [--vocab 150000] [--tokens 2048]

    naive     logits [B, T, V] of the completion positions, log_softmax, gather, backward
    chunked   grpo.forward.logprobs.Scorer, backward
    idle      nothing: the same imports, the same model and batch

Every measurement is a process of its own, naive and chunked in turn. Memory is the process's highest resident
size (ru_maxrss) minus that of the idle ones; time is one forward and backward after a warm-up on a single row,
on the wall and in CPU seconds of all threads (which other work on the machine disturbs less).
Both see completion positions only: the naive side is the better kind of naive.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torch waits: a child's peak starts at its parent's

ROWS, PROMPT_TOKENS, HIDDEN = 8, 32, 64


def peak_mb() -> float:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def build(vocab: int, tokens: int):
    """A two-layer Qwen3 and a batch of equally long rows."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo.training.collate import collate
    from grpo.types import TrainRow

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    rng = np.random.default_rng(0)
    length = tokens // ROWS
    rows = [
        TrainRow(
            n,
            tuple(rng.integers(0, vocab, PROMPT_TOKENS).tolist()),
            rng.integers(0, vocab, length).astype(np.int32),
            np.zeros(length, np.float32),
            None,
            float(rng.normal()),
        )
        for n in range(ROWS)
    ]
    weights = {row.row: 1.0 / tokens for row in rows}
    cpu = torch.device("cpu")
    return model, collate(rows, weights, cpu), collate(rows[:1], weights, cpu)


def naive_logprobs(model, micro):
    """[B, T] by way of [B, T, V]."""
    import torch

    logits = model(input_ids=micro.input_ids, logits_to_keep=micro.target_ids.shape[1], use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, micro.target_ids[..., None])[..., 0]


def backward(logprobs, micro) -> None:
    (-logprobs * micro.advantages[:, None] * micro.weights).sum().backward()


def measure(what: str, args: argparse.Namespace) -> dict[str, float]:
    """One measurement, in this process."""
    from grpo.config.settings import Config
    from grpo.forward.logprobs import Scorer

    model, micro, one_row = build(args.vocab, args.tokens)
    scorer = Scorer(model, Config(model="none", logits_chunk_mb=args.chunk_mb))
    forward = {
        "naive": lambda batch: naive_logprobs(model, batch),
        "chunked": scorer,
    }
    if what == "idle":
        return {"peak_mb": peak_mb()}
    if what == "gradients":
        gradients = []
        for way in forward.values():
            model.zero_grad()
            backward(way(micro), micro)
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        gaps = [(ours - theirs).norm() for theirs, ours in zip(*gradients, strict=True)]
        sizes = [theirs.norm() for theirs in gradients[0]]
        whole = float(sum(g**2 for g in gaps) ** 0.5 / sum(s**2 for s in sizes) ** 0.5)
        return {"whole": whole, "worst_tensor": max(float(g / s) for g, s in zip(gaps, sizes, strict=True))}
    backward(forward[what](one_row), one_row)
    model.zero_grad()
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    backward(forward[what](micro), micro)
    return {
        "peak_mb": peak_mb(),
        "wall_s": time.monotonic() - start_s,
        "cpu_s": time.process_time() - start_cpu_s,
    }


def in_fresh_process(what: str, argv: list[str]) -> dict[str, float]:
    """Measure in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *argv, "--only", what], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens, in 8 rows")
    parser.add_argument("--chunk_mb", type=int, default=256, help="logits_chunk_mb of the trainer")
    parser.add_argument("--only", choices=["idle", "naive", "chunked", "gradients"], help="measure once, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found: dict[str, list[dict[str, float]]] = {"idle": [], "naive": [], "chunked": []}
    for pair in range(args.pairs):
        for what in ("idle", *(("naive", "chunked") if pair % 2 == 0 else ("chunked", "naive"))):
            found[what].append(in_fresh_process(what, sys.argv[1:]))
    idle = statistics.median(m["peak_mb"] for m in found["idle"])
    columns = {
        what: {
            "peak above idle, MB": [m["peak_mb"] - idle for m in found[what]],
            "wall s": [m["wall_s"] for m in found[what]],
            "CPU s": [m["cpu_s"] for m in found[what]],
        }
        for what in ("naive", "chunked")
    }
    print(
        f"vocabulary {args.vocab}, hidden {HIDDEN}, {args.tokens} completion tokens, whole logits "
        f"{args.tokens * args.vocab * 4 / 2**20:.0f} MB, blocks of {args.chunk_mb} MB; medians of {args.pairs} pairs "
        f"(lowest - highest); idle process {idle:.0f} MB\n"
    )
    print("| | naive | chunked | naive / chunked |\n| --- | ---: | ---: | ---: |")
    for name, naive in columns["naive"].items():
        sides = [naive, columns["chunked"][name]]
        medians = [statistics.median(side) for side in sides]
        digits = 0 if name.endswith("MB") else 1
        cells = [f"{m:.{digits}f} ({min(side):.{digits}f} - {max(side):.{digits}f})" for m, side in zip(medians, sides)]
        print(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |", flush=True)
    gap = in_fresh_process("gradients", sys.argv[1:])
    print(f"\ngradient, chunked against naive, relative: {gap['whole']:.1e} (worst tensor {gap['worst_tensor']:.1e})")


if __name__ == "__main__":
    main()
