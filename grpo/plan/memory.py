"""Formulas for the memory of each process and the bytes it sends in a step; grpo/plan/command.py prints them.

The model is built without storage, so that parameters are counted exactly. A figure is the sum of what is alive at
once, in the worst case that the settings allow: every prompt and completion at its longest, every row with a
gradient. docs/scaling.md explains the formulas and says against what they were checked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from grpo.config.settings import Config, prompts_per_step, updates_per_step
from grpo.plan.model_size import Held, Shape, held, shape_of
from grpo.rollout import cut_chunks
from grpo.rollout.sampling import sampling_of
from grpo.training.backends.ddp import BUCKET_ELEMENTS

PHASES = ("start-up", "rollout", "update", "optimizer")
REST = PHASES[1:]
ZERO_BUCKET, ZERO_LIVE = 2**26, 10**9  # elements: backends/zero.py's buckets, DeepSpeed's stage3_max_live_parameters
SAVED = {  # bytes kept for the backward, by token and layer, for each element of (hidden, queries, keys, mlp) width
    "plain": {"fp32": (24, 8, 8, 16), "bf16": (26, 4, 4, 8)},
    "qk_norm": {"fp32": (24, 16, 16, 16), "bf16": (26, 10, 10, 8)},
    "four_norms": {"fp32": (40, 16, 16, 16), "bf16": (42, 12, 12, 8)},
    "gpt2": {"fp32": (16, 8, 8, 20), "bf16": (20, 4, 4, 8)},
}


@dataclass(frozen=True)
class Row:
    """One use of memory: bytes, and the phases during which it is held."""

    name: str
    bytes: float
    phases: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU and bytes it sends in one step."""

    shape: Shape
    rows: tuple[Row, ...]
    moved: tuple[Row, ...]
    host_bytes: float  # of each process, in CPU memory

    def at(self, phase: str, without: str = "") -> float:
        """Bytes alive in a phase, the row named `without` left out."""
        return sum(row.bytes for row in self.rows if phase in row.phases and row.name != without)

    def peak(self, without: str = "") -> float:
        """Bytes at the highest."""
        return max(self.at(phase, without) for phase in PHASES)

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(PHASES, key=self.at)


def kv_bytes(shape: Shape, rows: int, tokens: int, dtype: str) -> int:
    """KV cache of `rows` sequences, and the one tensor that exists twice while a token is appended.

    fp32 also in bf16 arithmetic: the rotation promotes keys, and DynamicCache gives values the keys' type.
    """
    size = 2 if dtype == "bf16" and shape.style == "gpt2" else 4  # gpt2 rotates nothing
    held = (shape.layers - shape.sliding) * tokens + shape.sliding * min(tokens, shape.window)
    return rows * shape.keys * size * (2 * held + tokens)


def layer_bytes(shape: Shape, tokens: int, row_tokens: int, dtype: str) -> int:
    """What one layer keeps for the backward of `tokens` in rows of `row_tokens`."""
    widths = (shape.hidden, shape.queries, shape.keys, shape.mlp)
    saved = sum(a * b for a, b in zip(SAVED[shape.style][dtype], widths, strict=True))
    return tokens * (saved + 8 * shape.score_heads * row_tokens)


def activation_bytes(shape: Shape, tokens: int, row_tokens: int, dtype: str, checkpointing: bool) -> int:
    """What a micro-batch keeps for its backward: every layer's, or the inputs of all and the inside of one.

    To that, three tensors after the last layer.
    """
    one = layer_bytes(shape, tokens, row_tokens, dtype)
    kept = shape.layers * tokens * shape.hidden * 4 + one if checkpointing else shape.layers * one
    return kept + 3 * tokens * shape.hidden * 4


def head_bytes(shape: Shape, completion_tokens: int, chunk_mb: int, truncates: bool, frozen: bool = False) -> int:
    """One block of logits, fp32, in the backward: 4 copies (3 under truncation), or 1 and the head's new gradient.

    The block; its softmax twice; its gradient, which comes in two parts. A frozen head has no gradient.
    """
    block = min(completion_tokens * shape.vocab * 4, max(chunk_mb * 2**20, shape.vocab * 4))
    return max((3 if truncates else 4) * block, 0 if frozen else block + shape.vocab * shape.hidden * 4)


def draw_bytes(shape: Shape, rows: int, temperature: float) -> int:
    """Logits [rows, V] while a token is drawn: fp32 logits, their exponentials, and those padded to whole blocks."""
    scaled = 0 if temperature == 1.0 else 4
    return rows * shape.vocab * (12 + scaled)


def all_reduce(size: float, ranks: int) -> float:
    """Bytes each rank sends in a ring all-reduce: twice (W-1)/W of them.

    >>> all_reduce(8.0, 4)
    12.0
    """
    return 2 * size * (ranks - 1) / ranks


def one_way(size: float, ranks: int) -> float:
    """Bytes each rank sends in a ring all-gather or reduce-scatter: (W-1)/W of the whole.

    >>> one_way(8.0, 4)
    6.0
    """
    return size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Work:
    """Worst-case sizes of one rank's step."""

    row_tokens: int  # of the longest row
    micro_rows: int
    micro_batches: int  # of one optimizer step, on the busiest rank
    decode_rows: int  # that decode at once
    cache_tokens: int  # of prompts and completions in the KV cache
    rank_rows: int  # rows that one rank trains on, in a step


def work_of(cfg: Config, ranks: int) -> Work:
    """Sizes of a step when every row is as long as it may be.

    >>> work_of(Config(batch_size=4, gradient_accumulation_steps=1, max_prompt_length=100, max_generate_length=100), 2)
    Work(row_tokens=200, micro_rows=16, micro_batches=1, decode_rows=16, cache_tokens=3200, rank_rows=16)
    """
    row_tokens = cfg.max_prompt_length + cfg.max_generate_length
    rows = prompts_per_step(cfg) * cfg.num_generations
    per_update = math.ceil(prompts_per_step(cfg) / cfg.num_minibatches) * cfg.num_generations
    micro_rows = min(per_update, max(1, cfg.micro_batch_tokens // row_tokens))
    micro_batches = math.ceil(math.ceil(per_update / micro_rows) / ranks)
    chunk = len(cut_chunks(prompts_per_step(cfg), cfg.num_generations, cfg.rollout_chunk_rows)[0])
    limit = cfg.rollout_tokens or chunk * row_tokens
    decode_rows = min(chunk, max(1, limit // cfg.max_generate_length))  # a prompt counts once for many rows
    cache_tokens = min(decode_rows * row_tokens, max(limit, row_tokens))
    rank_rows = min(rows, micro_batches * micro_rows * cfg.num_minibatches)
    return Work(row_tokens, micro_rows, micro_batches, decode_rows, cache_tokens, rank_rows)


def _state_rows(cfg: Config, shape: Shape, own: Held, ranks: int, on_gpu: bool, again: bool) -> Iterator[Row]:
    """Rows that depend on the backend: weights, gradients, moments, buckets. again: a second micro-batch follows."""
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    whole, share = 4 * own.trained, 4 * math.ceil(own.trained / ranks)
    off_state, off_weights = cfg.offload != "none" and on_gpu, cfg.offload == "all" and on_gpu
    loading = own.weights if cfg.load_in_4bit and on_gpu else 4 * shape.parameters
    yield Row("weights while loading", loading, ("start-up",), "every process loads them whole, then shards")
    if stage in (1, 2):
        yield Row("flat copy while sharding", whole, ("start-up",))
    held_as = "4 bits" if cfg.load_in_4bit else "frozen" if cfg.lora_r else "fp32"
    yield Row("weights", 0 if off_weights else own.weights / (ranks if stage == 3 else 1), REST, held_as)
    if stage >= 1:
        yield Row("master weights", 0 if off_state else share, PHASES, "DeepSpeed's own fp32 copy of its share")
    yield Row("moments", 0 if off_state else own.moments / (ranks if stage else 1), REST, cfg.optimizer)
    sharded = stage >= 2
    gradients = (0 if off_state else share) if sharded else whole
    early = gradients if again or sharded else 4 * own.trained_largest  # a first backward has none before the head's
    yield Row("gradients", early, ("update",), "fp32, while activations are held")
    yield Row("gradients, all", gradients + (share if stage in (1, 2, 3) and not off_state else 0), ("optimizer",))
    if cfg.deterministic:
        yield Row("gradients in int64", 2 * whole, REST, "deterministic")
    if stage == 0 and ranks > 1:
        yield Row("gradient bucket", 4 * min(max(BUCKET_ELEMENTS, own.trained_largest), own.trained), ("update",))
    if stage >= 1:
        when = REST if stage == 3 else ("update",)  # stage 3 allocates it once, for good
        yield Row("gradient bucket", 4 * min(own.trained, ZERO_BUCKET), when)
    if stage == 3 and ranks > 1:
        yield Row("gathered weights", min(own.weights, 4 * ZERO_LIVE), ("update",), "DeepSpeed's live limit")
    if stage and not off_state:  # without DeepSpeed the optimizer is fused, and needs none
        step = share if on_gpu else 2 * share
        yield Row("AdamW's temporaries", step, ("optimizer",))


def _reference_row(cfg: Config, whole: int, on_gpu: bool) -> Iterator[Row]:
    if cfg.beta > 0 and cfg.lora_r:
        yield Row("reference", 0, PHASES, "the frozen model itself, its adapter off")
    elif cfg.beta > 0:
        away = cfg.reference_offload and on_gpu
        why = "in CPU memory but while it scores" if away else "whole on every GPU, every backend"
        yield Row("reference", whole, ("rollout",) if away else PHASES, why)


def estimate(cfg: Config, model_config: PreTrainedConfig, world_size: int) -> Estimate:
    """Memory of each process and bytes it sends in a step, for a config on `world_size` processes."""
    return estimate_shape(cfg, shape_of(model_config), world_size)


def estimate_shape(cfg: Config, shape: Shape, world_size: int) -> Estimate:
    """The same for a model that is counted already."""
    work, on_gpu = work_of(cfg, world_size), cfg.device != "cpu"
    sampling = sampling_of(cfg)
    own, completion, width = held(cfg, shape), cfg.max_generate_length, sampling.support_width
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    rows = list(_state_rows(cfg, shape, own, world_size, on_gpu, work.micro_batches > 1))
    rows += _reference_row(cfg, 4 * shape.parameters, on_gpu)
    if stage == 3:
        rows.append(Row("rollout copy", own.weights, REST, "the engine's gathered weights, whole on every GPU"))
        rows.append(Row("parameter being gathered", 8 * shape.largest, ("rollout",)))
    if cfg.dtype == "bf16":
        phases = ("update",) if stage == 3 or cfg.lora_r else ("rollout", "update")
        rows.append(Row("bf16 copies of weights", own.copies, phases, "autocast keeps them for the backward"))
    micro_tokens = work.micro_rows * (work.row_tokens - 1)
    sizes = (shape, micro_tokens, work.row_tokens, cfg.dtype)
    away = 0.0
    activations = activation_bytes(*sizes, cfg.gradient_checkpointing)
    if not cfg.gradient_checkpointing:
        activations += micro_tokens * own.adapter_tokens
    if cfg.activation_offload and on_gpu:  # all but one layer's inside, and what follows the last
        away, activations = activations, layer_bytes(*sizes) + 3 * micro_tokens * shape.hidden * 4
    logits = head_bytes(shape, work.micro_rows * completion, cfg.logits_chunk_mb, width > 0, cfg.lora_r > 0)
    record = work.rank_rows * (8 * work.row_tokens + completion * (29 + 8 * width))
    cache = kv_bytes(shape, 1, work.row_tokens, cfg.dtype) * work.cache_tokens / work.row_tokens
    rows += [
        Row("KV cache", cache, ("rollout",), f"{work.cache_tokens:,} tokens"),
        Row("drawing a token", draw_bytes(shape, work.decode_rows, cfg.temperature), ("rollout",)),
        Row("what was drawn", work.decode_rows * completion * (16 + 4 * width), ("rollout",)),
        Row("activations", activations, ("update",), "one micro-batch"),
        Row("logits block", logits, ("update",)),
        Row("rows to train on", record, ("update", "optimizer"), "ids, log-probs, support"),
    ]
    copy = 4 * own.trained + own.moments / world_size  # rank 0's weights, every rank's share of the moments
    if cfg.save_in_background and not on_gpu:
        rows.append(Row("checkpoint being written", copy, REST, "a copy, while training goes on"))
    payload = work.rank_rows * completion * 4 * (2 + width)
    host = 4 * shape.parameters + payload + copy + away + (_offloaded(cfg, own, world_size) if on_gpu else 0)
    if cfg.reference_offload and on_gpu:
        host += 4 * shape.parameters
    return Estimate(shape, tuple(rows), tuple(_moved(cfg, own, work, world_size, payload)), host)


def _offloaded(cfg: Config, own: Held, ranks: int) -> float:
    """Bytes of a process that live in CPU memory: master weights, gradients, two moments; under `all` weights too."""
    state = 0.0 if cfg.offload == "none" else 16 * own.trained
    return (state + (own.weights if cfg.offload == "all" else 0)) / ranks


def _moved(cfg: Config, own: Held, work: Work, ranks: int, payload: int) -> Iterator[Row]:
    """Bytes that one process sends in a step, worst case."""
    whole, updates = 4 * own.trained, updates_per_step(cfg)
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    backwards = updates * work.micro_batches
    if stage < 3:
        times = backwards if stage == 2 else updates
        yield Row("gradients, all-reduce", times * all_reduce(whole, ranks), (), f"{times} x")
    if stage in (1, 2):
        yield Row("weights, all-gather", updates * one_way(whole, ranks), (), f"{updates} x")
    if stage == 3:
        gathers = backwards * (1 if own.weights <= 4 * ZERO_LIVE else 2)  # within the limit they stay for the backward
        yield Row("weights, forward and backward", gathers * one_way(own.weights, ranks), (), f"{gathers} x")
        yield Row("gradients, reduce-scatter", backwards * one_way(whole, ranks), (), f"{backwards} x")
        yield Row("weights, for the rollout", one_way(whole, ranks), (), "once")
    yield Row("exchange of rows", one_way(payload, ranks), (), "gloo, CPU memory")
