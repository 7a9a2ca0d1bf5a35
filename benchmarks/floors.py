"""The least that each phase of a step must compute and move, and what this machine can compute and move.

A floor is max(FLOPs / matmul ceiling, bytes / bandwidth). What is in it, for a model with N body parameters (without
embedding and head), L layers, V words and hidden size H, whose rows have prompts of l and completions of C tokens:

    prefill            each distinct prompt once, what all begin with once: 2 N a token, 2 H V a prompt, attention;
                       weights read once, keys and values written
    decode             C - 1 tokens a completion: 2 N + 2 H V each, attention; the weights once a call, in as many calls
                       as the longest completion needs, when all rows decode at once; keys and values once a call, a
                       prompt's once for all its rows
    drawing            V fp32 logits a token, read once
    logprobs           with beta > 0 one forward of the reference; else nothing
    forward, backward  rows that carry gradient, without padding, each group's prompt once, what all begin with once a
                       minibatch, 3 times the forward's FLOPs, 2 H V a completion token; weights read in both
                       directions, gradients written
    optimizer          fp32 gradients read for the norm and for the step; weights and two moments read and written

Attention is 4 L heads head_dim for each token and each token it sees. Left out: activations, norms, rotations, softmax,
the last layer's saving where only some positions are needed, recomputed activations. Windows are counted as if all was
seen. Bandwidth is that of main memory: what stays in a cache may be faster than its floor in bytes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo.forward.flat_rows import common_prefix

FP32 = 4  # bytes
TRIES = 5
COPY_ELEMENTS = 2**26  # 256 MB of fp32, beyond any cache


@dataclass(frozen=True)
class Shape:
    """A model in numbers."""

    body: int  # parameters without embedding and head
    head: int  # H V
    parameters: int  # all that are trained, a tied matrix once
    vocab: int
    attention: int  # FLOPs for a token and a token it sees: 4 L heads head_dim
    kept: int  # numbers kept a token: 2 L kv_heads head_dim
    width: int = FP32  # bytes of a weight, a key, a value where they are used


@dataclass(frozen=True)
class Rows:
    """A step's rows: row n belongs to prompts[n // group]."""

    prompts: Sequence[tuple[int, ...]]
    group: int
    lengths: Sequence[int]  # tokens of each completion, N = P group
    minibatches: Sequence[Sequence[int]]  # the rows that carry gradient
    passes: int = 1  # over the minibatches
    reference: bool = False


@dataclass(frozen=True)
class Work:
    """What a phase needs."""

    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, work: Work) -> float:
        """Seconds that the work takes at least."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)

    def bound(self, work: Work) -> str:
        """Which of the two decides."""
        return "FLOPs" if work.flops / self.flops_per_s >= work.bytes / self.bytes_per_s else "bytes"


def shape_of(model: Any, width: int = FP32) -> Shape:
    """A transformers causal language model in numbers. width: bytes of a number in the run's dtype."""
    config = model.config.get_text_config()
    own = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    ends = {id(module.weight): module.weight.numel() for module in _ends(model)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(
        parameters - sum(ends.values()),
        model.get_output_embeddings().weight.numel(),
        parameters,
        config.vocab_size,
        4 * config.num_hidden_layers * heads * own,
        2 * config.num_hidden_layers * kv_heads * own,
        width,
    )


def _ends(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def seen(first: int, last: int) -> int:
    """Tokens that the tokens at positions first to last - 1 see, each itself included.

    >>> seen(0, 3), seen(2, 4)
    (6, 7)
    """
    return (last * (last + 1) - first * (first + 1)) // 2


def _forward(shape: Shape, tokens: int, context: int, predictions: int) -> Work:
    flops = 2 * shape.body * tokens + shape.attention * context + 2 * shape.head * predictions
    return Work(tokens, flops)


def prefill(shape: Shape, rows: Rows) -> Work:
    """Each distinct prompt once."""
    distinct = list(dict.fromkeys(rows.prompts))
    header = common_prefix(distinct)
    tokens = header + sum(len(ids) - header for ids in distinct)
    context = seen(0, header) + sum(seen(header, len(ids)) for ids in distinct)
    moved = (shape.body + shape.head + tokens * shape.kept) * shape.width
    return _forward(shape, tokens, context, len(distinct)) + Work(bytes=moved)


def decode(shape: Shape, rows: Rows) -> Work:
    """Every token but the first of each completion, all rows at once."""
    asked = [rows.prompts[n // rows.group] for n in range(len(rows.lengths))]
    tokens = sum(max(0, length - 1) for length in rows.lengths)
    context = sum(seen(len(ids), len(ids) + n - 1) for ids, n in zip(asked, rows.lengths, strict=True) if n > 1)
    header = common_prefix(list(dict.fromkeys(rows.prompts)))
    calls = max(0, max(rows.lengths, default=0) - 1)
    kept = 0
    for call in range(1, calls + 1):  # takes token `call` of those that go on, which then have so many of their own
        alive = [n for n, length in enumerate(rows.lengths) if length > call]
        kept += header + sum(len(ids) - header for ids in {asked[n] for n in alive}) + call * len(alive)
    moved = (calls * (shape.body + shape.head) + kept * shape.kept) * shape.width
    return _forward(shape, tokens, context, tokens) + Work(bytes=moved)


def drawing(shape: Shape, rows: Rows) -> Work:
    """Every token's logits, read once."""
    tokens = sum(rows.lengths)
    return Work(tokens, bytes=FP32 * shape.vocab * tokens)


def _scoring(shape: Shape, rows: Rows, minibatch: Sequence[int]) -> Work:
    """One forward over rows, without the bytes."""
    groups = sorted({n // rows.group for n in minibatch})
    if not groups:
        return Work()
    prompts = [rows.prompts[group] for group in groups]
    header = common_prefix(prompts)
    own = {n: rows.lengths[n] - 1 for n in minibatch}  # the last token predicts nothing
    tokens = header + sum(len(ids) - header for ids in prompts) + sum(own.values())
    context = seen(0, header) + sum(seen(header, len(ids)) for ids in prompts)
    for n, count in own.items():
        start = len(rows.prompts[n // rows.group])
        context += seen(start, start + count)
    return _forward(shape, tokens, context, sum(rows.lengths[n] for n in minibatch))


def logprobs(shape: Shape, rows: Rows) -> Work:
    """The reference, where there is one."""
    needed = Work()
    for minibatch in rows.minibatches if rows.reference else ():
        forward = _scoring(shape, rows, minibatch)
        needed += forward + Work(bytes=(shape.body + shape.head) * shape.width * bool(forward.tokens))
    return needed


def forward_backward(shape: Shape, rows: Rows) -> Work:
    """Every pass over every minibatch."""
    needed = Work()
    for minibatch in rows.minibatches:
        forward = _scoring(shape, rows, minibatch)
        moved = 2 * (shape.body + shape.head) * shape.width + FP32 * shape.parameters
        needed += Work(forward.tokens, 3 * forward.flops, moved * bool(forward.tokens))
    return Work(needed.tokens * rows.passes, needed.flops * rows.passes, needed.bytes * rows.passes)


def optimizer(shape: Shape, rows: Rows) -> Work:
    """Gradient twice; weights and two moments read and written."""
    return Work(bytes=8 * FP32 * shape.parameters * len(rows.minibatches) * rows.passes)


def best_s(work: Callable[[], object], settle: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries, after one that warms up."""
    times = []
    for _ in range(TRIES + 1):
        settle()
        start = time.perf_counter()
        work()
        settle()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Product of two square matrices; copy and sum of 256 MB, whichever moves more bytes a second."""
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    size = 8192 if device.type == "cuda" else 2048
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    flops = 2 * size**3 / best_s(lambda: torch.mm(left, right, out=out), settle)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    copied = 2 * FP32 * COPY_ELEMENTS / best_s(lambda: target.copy_(source), settle)
    summed = FP32 * COPY_ELEMENTS / best_s(lambda: source.sum(), settle)
    return Ceilings(flops, max(copied, summed))
