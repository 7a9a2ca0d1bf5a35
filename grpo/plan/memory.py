"""Formulas for the memory of each process and the bytes it sends in a step; grpo/plan/command.py prints them.

The model is built on the meta device, so that parameters are counted exactly. A figure is the sum of what is allocated
at the same time in the worst case that the settings allow: every prompt and completion at its longest, every row with
a gradient. docs/scaling.md explains the formulas and lists the measurements that they were compared with.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from grpo.config.settings import Config, is_deepspeed, prompts_per_step, shards_weights, updates_per_step
from grpo.forward.recomputed import recomputes_cheap
from grpo.plan.model_size import BF16_BYTES, FP32_BYTES, ModelSize, ModelStates, model_size, model_states
from grpo.rollout.chunks import cut_chunks
from grpo.rollout.sampling import Sampling, sampling_of
from grpo.runtime.shares import next_multiple, shares_of
from grpo.training.backends.gradient_sums import BUCKET_ELEMENTS
from grpo.training.entropy import has_bonus, scores_entropy

MEMORY_PHASES = ("start-up", "rollout", "update", "optimizer")
AFTER_LOADING = MEMORY_PHASES[1:]
ZERO_BUCKET = 2**26  # elements of a bucket in training/backends/deepspeed.py
ZERO_LIVE = 10**9  # elements: DeepSpeed's stage3_max_live_parameters
# Bytes kept for the backward, by token and layer, for each element of (hidden, queries, keys, mlp) width: of everything
# that autograd keeps, and without what is computed again (grpo/forward/recomputed.py).
SAVED = {
    "plain": {"fp32": (24, 8, 8, 16), "bf16": (26, 4, 4, 8)},
    "qk_norm": {"fp32": (24, 16, 16, 16), "bf16": (26, 10, 10, 8)},
    "four_norms": {"fp32": (40, 16, 16, 16), "bf16": (42, 12, 12, 8)},
    "gpt2": {"fp32": (16, 8, 8, 20), "bf16": (20, 4, 4, 8)},
}
SAVED_OF_RECOMPUTED = {
    "plain": {"fp32": (16, 8, 8, 8), "bf16": (18, 4, 4, 4)},
    "qk_norm": {"fp32": (16, 12, 12, 8), "bf16": (18, 6, 6, 4)},
    "four_norms": {"fp32": (24, 12, 12, 8), "bf16": (22, 6, 6, 4)},
    "gpt2": SAVED["gpt2"],
}


@dataclass(frozen=True)
class Entry:
    """One line of the report: bytes allocated during some phases, or bytes sent in a step (no phases)."""

    name: str
    bytes: float
    phases: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU and bytes it sends in one step."""

    size: ModelSize
    memory: tuple[Entry, ...]
    traffic: tuple[Entry, ...]
    host_bytes: float  # of each process, in CPU memory

    def at(self, phase: str, without: str = "") -> float:
        """Bytes allocated in a phase, without the entry of that name."""
        return sum(entry.bytes for entry in self.memory if phase in entry.phases and entry.name != without)

    def peak(self, without: str = "") -> float:
        """Bytes in the phase that needs most."""
        return max(self.at(phase, without) for phase in MEMORY_PHASES)

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(MEMORY_PHASES, key=self.at)


def kv_bytes(size: ModelSize, rows: int, tokens: int, dtype: str) -> int:
    """KV cache of `rows` sequences, and the one tensor that exists twice while a token is appended.

    The cache is fp32 also in bf16 arithmetic: the rotation promotes keys, and DynamicCache gives values the keys' type.
    """
    element = BF16_BYTES if dtype == "bf16" and size.style == "gpt2" else FP32_BYTES  # gpt2 has no rotation
    layer_tokens = (size.layers - size.sliding) * tokens + size.sliding * min(tokens, size.window)
    keys_and_values = 2 * layer_tokens
    return rows * size.keys * element * (keys_and_values + tokens)


def layer_bytes(size: ModelSize, tokens: int, row_tokens: int, dtype: str, recomputes: bool) -> int:
    """What one layer stores for the backward of `tokens` in rows of `row_tokens`."""
    widths = (size.hidden, size.queries, size.keys, size.mlp)
    elements = (SAVED_OF_RECOMPUTED if recomputes else SAVED)[size.style][dtype]
    saved = sum(element * width for element, width in zip(elements, widths, strict=True))
    scores = 2 * FP32_BYTES * size.score_heads * row_tokens  # eager attention: capped scores and their softmax
    return tokens * (saved + scores)


def _after_layers_bytes(size: ModelSize, tokens: int) -> int:
    """Three tensors [tokens, hidden] after the last layer."""
    return 3 * tokens * size.hidden * FP32_BYTES


def activation_bytes(
    size: ModelSize, tokens: int, row_tokens: int, dtype: str, recomputes: bool, checkpointing: bool
) -> int:
    """What a micro-batch stores for its backward: all layers, or with checkpointing all inputs and one layer."""
    one_layer = layer_bytes(size, tokens, row_tokens, dtype, recomputes)
    layer_inputs = size.layers * tokens * size.hidden * FP32_BYTES
    layers = layer_inputs + one_layer if checkpointing else size.layers * one_layer
    return layers + _after_layers_bytes(size, tokens)


def head_bytes(
    size: ModelSize, completion_tokens: int, chunk_mb: int, truncates: bool, frozen: bool = False, more_copies: int = 0
) -> int:
    """One block of logits, fp32, in the backward: 4 copies (3 under truncation), or 1 and the head's new gradient.

    The copies are the block, its softmax twice, and its gradient in two parts. A frozen head has no gradient.
    more_copies: see `entropy_copies`.
    """
    row = size.vocab * FP32_BYTES
    block = min(completion_tokens * row, max(chunk_mb * 2**20, row))
    return max((3 if truncates else 4 + more_copies) * block, 0 if frozen else block + row * size.hidden)


def entropy_copies(cfg: Config) -> int:
    """Further copies of a block of logits where entropies are measured with the log-probs, without truncation.

    One in the fused head; where the head goes through autograd its log-probs, their exponentials and the product.
    """
    return (3 if shards_weights(cfg) else 1) if has_bonus(cfg) or scores_entropy(cfg) else 0


def draw_bytes(size: ModelSize, rows: int, sampling: Sampling) -> int:
    """Tensors [rows, V] while a token is drawn: logits, exponentials, and those padded to whole blocks; all fp32.

    A temperature other than 1 makes a scaled copy of the logits, and an entropy over the whole vocabulary another.
    """
    copies = 3 + (sampling.temperature != 1.0) + (sampling.records_entropy and not sampling.truncates)
    return rows * size.vocab * FP32_BYTES * copies


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
    decode_rows: int  # rows that decode at the same time
    cache_tokens: int  # tokens of prompts and completions in the KV cache
    rank_rows: int  # rows that one rank trains on in a step


def work_of(cfg: Config, ranks: int) -> Work:
    """Sizes of a step when every row is as long as it may be.

    >>> work_of(Config(batch_size=4, gradient_accumulation_steps=1, max_prompt_length=100, max_generate_length=100), 2)
    Work(row_tokens=200, micro_rows=8, micro_batches=1, decode_rows=8, cache_tokens=1600, rank_rows=8)
    """
    row_tokens = cfg.max_prompt_length + cfg.max_generate_length
    rows = prompts_per_step(cfg) * cfg.num_generations
    per_update = math.ceil(prompts_per_step(cfg) / cfg.num_minibatches) * cfg.num_generations
    shares = shares_of(cfg, ranks)
    most = max(1, cfg.micro_batch_tokens // row_tokens)  # rows of a micro-batch
    micro_rows = math.ceil(per_update / next_multiple(math.ceil(per_update / most), shares))
    micro_batches = math.ceil(math.ceil(per_update / micro_rows) / ranks)
    chunks = cut_chunks(prompts_per_step(cfg), cfg.num_generations, cfg.rollout_chunk_rows, shares)
    chunk = max(map(len, chunks))
    limit = cfg.rollout_tokens or chunk * row_tokens
    decode_rows = min(chunk, max(1, limit // cfg.max_generate_length))  # a prompt counts once for many rows
    cache_tokens = min(decode_rows * row_tokens, max(limit, row_tokens))
    rank_rows = min(rows, micro_batches * micro_rows * cfg.num_minibatches)
    return Work(row_tokens, micro_rows, micro_batches, decode_rows, cache_tokens, rank_rows)


def _zero_stage(cfg: Config) -> int:
    """0 without DeepSpeed."""
    return cfg.zero_stage if is_deepspeed(cfg) else 0


def _state_entries(
    cfg: Config, size: ModelSize, states: ModelStates, ranks: int, on_gpu: bool, accumulates: bool
) -> Iterator[Entry]:
    """Entries that depend on the backend: weights, gradients, moments, buckets.

    accumulates: an optimizer step has several micro-batches, so activations meet gradients of an earlier one.
    """
    stage = _zero_stage(cfg)
    all_gradients = FP32_BYTES * states.trained
    shard = FP32_BYTES * math.ceil(states.trained / ranks)
    optimizer_on_cpu, weights_on_cpu = cfg.offload != "none" and on_gpu, cfg.offload == "all" and on_gpu

    # start-up
    loading = states.weights if cfg.load_in_4bit and on_gpu else FP32_BYTES * size.parameters
    yield Entry("weights while loading", loading, ("start-up",), "every process loads them whole, then shards")
    if stage in (1, 2):
        yield Entry("flat copy while sharding", all_gradients, ("start-up",))

    # weights and moments
    precision = "4 bits" if cfg.load_in_4bit else "frozen" if cfg.lora_r else "fp32"
    weights = 0 if weights_on_cpu else states.weights / (ranks if stage == 3 else 1)
    yield Entry("weights", weights, AFTER_LOADING, precision)
    if stage >= 1:
        master = 0 if optimizer_on_cpu else shard
        yield Entry("master weights", master, MEMORY_PHASES, "DeepSpeed's own fp32 copy of its share")
    moments = 0 if optimizer_on_cpu else states.moments / (ranks if stage else 1)
    yield Entry("moments", moments, AFTER_LOADING, cfg.optimizer)

    # gradients: the first backward of a step has none before the head's
    sharded = stage >= 2
    gradients = (0 if optimizer_on_cpu else shard) if sharded else all_gradients
    with_activations = gradients if accumulates or sharded else FP32_BYTES * states.trained_largest
    yield Entry("gradients", with_activations, ("update",), "fp32, while activations are held")
    optimizer_copy = shard if stage in (1, 2, 3) and not optimizer_on_cpu else 0
    yield Entry("gradients, all", gradients + optimizer_copy, ("optimizer",))
    if cfg.deterministic:
        yield Entry("gradients in int64", 2 * all_gradients, AFTER_LOADING, "deterministic")

    # communication buffers
    if stage == 0 and ranks > 1:
        bucket = min(max(BUCKET_ELEMENTS, states.trained_largest), states.trained)
        yield Entry("gradient bucket", FP32_BYTES * bucket, ("update",))
    if stage >= 1:
        phases = AFTER_LOADING if stage == 3 else ("update",)  # stage 3 never frees it
        yield Entry("gradient bucket", FP32_BYTES * min(states.trained, ZERO_BUCKET), phases)
    if stage == 3 and ranks > 1:
        gathered = min(states.weights, FP32_BYTES * ZERO_LIVE)
        yield Entry("gathered weights", gathered, ("update",), "DeepSpeed's live limit")

    # the optimizer's step: without DeepSpeed AdamW is fused and needs no temporaries
    if stage and not optimizer_on_cpu:
        yield Entry("AdamW's temporaries", shard if on_gpu else 2 * shard, ("optimizer",))


def _reference_entry(cfg: Config, whole: int, on_gpu: bool) -> Iterator[Entry]:
    if cfg.beta > 0 and cfg.lora_r:
        yield Entry("reference", 0, MEMORY_PHASES, "the frozen model itself, its adapter off")
    elif cfg.beta > 0:
        offloaded = cfg.reference_offload and on_gpu
        note = "in CPU memory except while it scores" if offloaded else "whole on every GPU, every backend"
        yield Entry("reference", whole, ("rollout",) if offloaded else MEMORY_PHASES, note)


def estimate(cfg: Config, model_config: PreTrainedConfig, world_size: int) -> Estimate:
    """Memory of each process and bytes it sends in a step, for a config on `world_size` processes."""
    return estimate_for(cfg, model_size(model_config), world_size)


def estimate_for(cfg: Config, size: ModelSize, world_size: int) -> Estimate:
    """`estimate` of a model whose size is known."""
    work, on_gpu = work_of(cfg, world_size), cfg.device != "cpu"
    states, completion = model_states(cfg, size), cfg.max_generate_length
    sampling = sampling_of(cfg)
    support_width, chooses = sampling.support_width, cfg.top_entropy_share < 1
    loading = FP32_BYTES * size.parameters  # every process loads whole weights into CPU memory first

    # model states
    memory = list(_state_entries(cfg, size, states, world_size, on_gpu, work.micro_batches > 1))
    memory += _reference_entry(cfg, FP32_BYTES * size.parameters, on_gpu)
    native = cfg.rollout_engine == "native"
    if shards_weights(cfg) and native:
        note = "the engine's gathered weights, whole on every GPU"
        memory.append(Entry("rollout copy", states.weights, AFTER_LOADING, note))
        memory.append(Entry("parameter being gathered", 2 * FP32_BYTES * size.largest, ("rollout",)))
    if cfg.dtype == "bf16":
        phases = ("update",) if shards_weights(cfg) or cfg.lora_r else ("rollout", "update")
        memory.append(Entry("bf16 copies of weights", states.copies, phases, "autocast keeps them for the backward"))

    # activations of one micro-batch
    micro_tokens = work.micro_rows * (work.row_tokens - 1)
    sizes = (size, micro_tokens, work.row_tokens, cfg.dtype, recomputes_cheap(cfg))
    offloaded = 0.0
    activations = activation_bytes(*sizes, cfg.gradient_checkpointing)
    if not cfg.gradient_checkpointing:
        activations += micro_tokens * states.adapter_tokens
    if cfg.activation_offload and on_gpu:  # one layer and what follows the last layer stay on the GPU
        offloaded, activations = activations, layer_bytes(*sizes) + _after_layers_bytes(size, micro_tokens)

    # rows of a step: the constants are bytes per token of ids, positions, masks and log-probs
    of_head = (cfg.logits_chunk_mb, support_width > 0, cfg.lora_r > 0, entropy_copies(cfg))
    logits = head_bytes(size, work.micro_rows * completion, *of_head)
    flags = chooses + 4 * has_bonus(cfg)  # chosen tokens, and their weights in the bonus
    train_rows = work.rank_rows * (8 * work.row_tokens + completion * (29 + flags + 8 * support_width))
    cache = kv_bytes(size, 1, work.row_tokens, cfg.dtype) * work.cache_tokens / work.row_tokens
    drawn = work.decode_rows * completion * (16 + 4 * sampling.records_entropy + 4 * support_width)
    if native:
        memory.append(Entry("KV cache", cache, ("rollout",), f"{work.cache_tokens:,} tokens"))
        memory.append(Entry("drawing a token", draw_bytes(size, work.decode_rows, sampling), ("rollout",)))
    else:
        memory += _server_entries(cfg, size)
    memory += [
        Entry("what was drawn", drawn, ("rollout",)),
        Entry("activations", activations, ("update",), "one micro-batch"),
        Entry("logits block", logits, ("update",)),
        Entry("rows to train on", train_rows, ("update", "optimizer"), "ids, log-probs, support"),
    ]

    # a checkpoint's snapshot: rank 0's weights, every rank's shard of the moments
    snapshot = FP32_BYTES * states.trained + states.moments / world_size
    snapshot += FP32_BYTES * size.parameters if cfg.reference_sync_steps else 0  # a reference that is kept
    if cfg.save_in_background and not on_gpu:
        memory.append(Entry("checkpoint being written", snapshot, AFTER_LOADING, "a copy, while training goes on"))

    # CPU memory
    payload = work.rank_rows * completion * 4 * (2 + support_width)  # token ids, log-probs and support that are sent
    offloaded_states = _offloaded_states(cfg, states, world_size) if on_gpu else 0
    host_bytes = loading + payload + snapshot + offloaded + offloaded_states
    if cfg.reference_offload and on_gpu:
        host_bytes += FP32_BYTES * size.parameters
    traffic = list(_traffic(cfg, states, work, world_size, payload))
    if not native:
        sent = (FP32_BYTES if cfg.dtype == "fp32" else BF16_BYTES) * size.parameters
        how = "once for each server" if cfg.rollout_transfer == "http" else "as broadcasts"
        if cfg.rollout_transfer == "http":
            how += ", which keeps two copies in files"
        traffic.append(Entry("weights to a vLLM server", sent, (), how))
    return Estimate(size, tuple(memory), tuple(traffic), host_bytes)


def _server_entries(cfg: Config, size: ModelSize) -> Iterator[Entry]:
    """What rollouts by vLLM need on a training process's device."""
    sent = FP32_BYTES if cfg.dtype == "fp32" else BF16_BYTES
    if cfg.rollout_server is None:
        note = "its weights; with its KV cache 0.3 of the GPU, or --gpu-memory-utilization (vllm_args)"
        yield Entry("vLLM's server", sent * size.parameters, AFTER_LOADING, note)
    yield Entry("weights being sent", 2 * sent * size.largest, ("rollout",), "one tensor at a time")


def _offloaded_states(cfg: Config, states: ModelStates, ranks: int) -> float:
    """Bytes of a process in CPU memory: master weights, gradients, two moments; with `all` also the weights."""
    optimizer = 0.0 if cfg.offload == "none" else 4 * FP32_BYTES * states.trained
    return (optimizer + (states.weights if cfg.offload == "all" else 0)) / ranks


def _traffic(cfg: Config, states: ModelStates, work: Work, ranks: int, payload: int) -> Iterator[Entry]:
    """Bytes that one process sends in a step, worst case."""
    whole, updates = FP32_BYTES * states.trained, updates_per_step(cfg)
    stage = _zero_stage(cfg)
    backwards = updates * work.micro_batches
    if stage < 3:
        times = backwards if stage == 2 else updates
        yield Entry("gradients, all-reduce", times * all_reduce(whole, ranks), (), f"{times} x")
    if stage in (1, 2):
        yield Entry("weights, all-gather", updates * one_way(whole, ranks), (), f"{updates} x")
    if stage == 3:
        stay_for_backward = states.weights <= FP32_BYTES * ZERO_LIVE
        gathers = backwards * (1 if stay_for_backward else 2)
        yield Entry("weights, forward and backward", gathers * one_way(states.weights, ranks), (), f"{gathers} x")
        yield Entry("gradients, reduce-scatter", backwards * one_way(whole, ranks), (), f"{backwards} x")
        yield Entry("weights, for the rollout", one_way(whole, ranks), (), "once")
    yield Entry("exchange of rows", one_way(payload, ranks), (), "gloo, CPU memory")
