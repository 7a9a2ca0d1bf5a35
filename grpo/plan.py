"""What a run will need, before anything loads: memory of each GPU, bytes moved in each step.

    python -m grpo.plan --config F [--key value ...] --gpus 8 --gpu_memory 80 [--gpus_per_node 8]

Only the model's config is read: the model is built without storage, so that parameters are counted exactly. A
figure is the sum of what is alive at once, in the worst case the settings allow (every prompt and completion at its
longest). docs/scaling.md explains the formulas and says against what they were checked. GB are 10^9 bytes.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from grpo.backends.replicated import BUCKET_ELEMENTS
from grpo.config import Config, load_config, prompts_per_step, updates_per_step
from grpo.console import warn
from grpo.errors import UserError
from grpo.models import quiet, resolve
from grpo.rollout import cut_chunks
from grpo.rollout.sampling import sampling_of

GB = 10**9
PHASES = ("start-up", "rollout", "update", "optimizer")
REST = PHASES[1:]
ZERO_BUCKET, ZERO_LIVE = 2**26, 10**9  # elements: backends/zero.py's buckets, DeepSpeed's stage3_max_live_parameters
SAVED = {  # bytes kept for the backward, by token and layer, for each element of (hidden, queries, keys, mlp) width
    "fp32": {"plain": (24, 8, 8, 16), "qk_norm": (24, 16, 16, 16), "four_norms": (40, 16, 16, 16), "gpt2": (16, 8, 8, 20)},
    "bf16": {"plain": (26, 4, 4, 8), "qk_norm": (26, 10, 10, 8), "four_norms": (42, 12, 12, 8), "gpt2": (20, 4, 4, 8)},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model; counts of elements."""

    parameters: int  # all, a tied head once
    products: int  # of matrices that multiply: those that bf16 arithmetic copies
    largest: int  # the largest tensor
    layers: int
    hidden: int
    queries: int  # heads times their width
    keys: int  # key heads times their width
    mlp: int
    vocab: int
    style: str  # a row of SAVED
    window: int  # tokens kept by each sliding layer; 0: no such layers
    sliding: int  # layers that keep a window
    score_heads: int  # heads whose whole score matrix is held: eager attention; else 0


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


def shape_of(config: PreTrainedConfig) -> Shape:
    """Build the model without storage and count. Raises UserError for what is no causal language model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model: {config.model_type!r} is no causal language model here: {error}") from None
    text = config.get_text_config()
    names = {name.split(".")[-2] for name, _ in model.named_parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    style = "four_norms" if "post_feedforward_layernorm" in names else "qk_norm" if "q_norm" in names else "plain"
    window = getattr(text, "sliding_window", None) or 0
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        products=matrices - (0 if tied else model.get_input_embeddings().weight.numel()),  # type: ignore[operator]
        largest=max(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        mlp=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        style="gpt2" if config.model_type == "gpt2" else style,
        window=window,
        sliding=(getattr(text, "layer_types", None) or []).count("sliding_attention") if window else 0,
        score_heads=heads if getattr(text, "attn_logit_softcapping", None) else 0,
    )


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
    saved = sum(a * b for a, b in zip(SAVED[dtype][shape.style], widths, strict=True))
    return tokens * (saved + 8 * shape.score_heads * row_tokens)


def activation_bytes(shape: Shape, tokens: int, row_tokens: int, dtype: str, checkpointing: bool) -> int:
    """What a micro-batch keeps for its backward: every layer's, or the inputs of all and the inside of one.

    To that, three tensors after the last layer.
    """
    one = layer_bytes(shape, tokens, row_tokens, dtype)
    kept = shape.layers * tokens * shape.hidden * 4 + one if checkpointing else shape.layers * one
    return kept + 3 * tokens * shape.hidden * 4


def head_bytes(shape: Shape, completion_tokens: int, chunk_mb: int, truncates: bool) -> int:
    """One block of logits, fp32, in the backward: 4 copies (3 under truncation), or 1 and the head's new gradient.

    The block; its softmax twice; its gradient, which comes in two parts.
    """
    block = min(completion_tokens * shape.vocab * 4, max(chunk_mb * 2**20, shape.vocab * 4))
    return max((3 if truncates else 4) * block, block + shape.vocab * shape.hidden * 4)


def draw_bytes(shape: Shape, rows: int, temperature: float, truncates: bool) -> int:
    """Logits [rows, V] while a token is drawn: fp32 logits and log-probs, float64 probabilities and sum, int64 rank."""
    scaled = 0 if temperature == 1.0 else 4
    return rows * shape.vocab * (4 + scaled + (8 if truncates else 36))


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
    chunk_rows: int
    rank_rows: int  # rows that one rank trains on, in a step


def work_of(cfg: Config, ranks: int) -> Work:
    """Sizes of a step when every row is as long as it may be.

    >>> work_of(Config(batch_size=4, gradient_accumulation_steps=1, max_prompt_length=100, max_generate_length=100), 2)
    Work(row_tokens=200, micro_rows=16, micro_batches=1, chunk_rows=16, rank_rows=16)
    """
    row_tokens = cfg.max_prompt_length + cfg.max_generate_length
    rows = prompts_per_step(cfg) * cfg.num_generations
    per_update = math.ceil(prompts_per_step(cfg) / cfg.num_minibatches) * cfg.num_generations
    micro_rows = min(per_update, max(1, cfg.micro_batch_tokens // row_tokens))
    micro_batches = math.ceil(math.ceil(per_update / micro_rows) / ranks)
    chunk = len(cut_chunks(prompts_per_step(cfg), cfg.num_generations, cfg.rollout_chunk_rows)[0])
    return Work(
        row_tokens, micro_rows, micro_batches, chunk, min(rows, micro_batches * micro_rows * cfg.num_minibatches)
    )


def _state_rows(cfg: Config, shape: Shape, ranks: int, on_gpu: bool, again: bool) -> Iterator[Row]:
    """Rows that depend on the backend: weights, gradients, moments, buckets. again: a second micro-batch follows."""
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    whole, share = 4 * shape.parameters, 4 * math.ceil(shape.parameters / ranks)
    off_state, off_weights = cfg.offload != "none" and on_gpu, cfg.offload == "all" and on_gpu
    yield Row("weights while loading", whole, ("start-up",), "every process loads them whole, then shards")
    if stage in (1, 2):
        yield Row("flat copy while sharding", whole, ("start-up",))
    yield Row("weights", 0 if off_weights else share if stage == 3 else whole, REST, "fp32")
    if stage >= 1:
        yield Row("master weights", 0 if off_state else share, PHASES, "DeepSpeed's own fp32 copy of its share")
    yield Row("moments", 0 if off_state else 2 * (share if stage else whole), REST, "AdamW, fp32")
    sharded = stage >= 2
    gradients = (0 if off_state else share) if sharded else whole
    early = gradients if again or sharded else 4 * shape.largest  # a first backward has none before the head's
    yield Row("gradients", early, ("update",), "fp32, while activations are held")
    yield Row("gradients, all", gradients + (share if stage in (1, 2, 3) and not off_state else 0), ("optimizer",))
    if cfg.deterministic:
        yield Row("gradients in int64", 2 * whole, REST, "deterministic")
    if stage == 0 and ranks > 1:
        yield Row("gradient bucket", 4 * max(BUCKET_ELEMENTS, shape.largest), ("optimizer",))
    if stage >= 1:
        yield Row("gradient bucket", 4 * min(shape.parameters, ZERO_BUCKET), ("update",))
    if stage == 3 and ranks > 1:
        yield Row("gathered weights", 4 * min(shape.parameters, ZERO_LIVE), ("update",), "DeepSpeed's live limit")
    if not off_state:
        step = (share if stage else whole) if on_gpu else 2 * (share if stage else 4 * shape.largest)
        yield Row("AdamW's temporaries", step, ("optimizer",))


def estimate(cfg: Config, model_config: PreTrainedConfig, world_size: int) -> Estimate:
    """Memory of each process and bytes it sends in a step, for a config on `world_size` processes."""
    shape, work, on_gpu = shape_of(model_config), work_of(cfg, world_size), cfg.device != "cpu"
    sampling = sampling_of(cfg)
    whole, completion, width = 4 * shape.parameters, cfg.max_generate_length, sampling.support_width
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    rows = list(_state_rows(cfg, shape, world_size, on_gpu, work.micro_batches > 1))
    if cfg.beta > 0:
        rows.append(Row("reference", whole, PHASES, "whole on every GPU, every backend"))
    if stage == 3:
        rows.append(Row("rollout copy", whole, REST, "the engine's gathered weights, whole on every GPU"))
        rows.append(Row("parameter being gathered", 8 * shape.largest, ("rollout",)))
    if cfg.dtype == "bf16":
        phases = ("update",) if stage == 3 else ("rollout", "update")
        rows.append(Row("bf16 copies of weights", 2 * shape.products, phases, "autocast keeps them for the backward"))
    micro_tokens = work.micro_rows * (work.row_tokens - 1)
    record = work.rank_rows * (8 * work.row_tokens + completion * (29 + 8 * width))
    rows += [
        Row("KV cache", kv_bytes(shape, work.chunk_rows, work.row_tokens, cfg.dtype), ("rollout",), "one chunk"),
        Row("drawing a token", draw_bytes(shape, work.chunk_rows, cfg.temperature, width > 0), ("rollout",)),
        Row("what was drawn", work.chunk_rows * completion * (16 + 4 * width), ("rollout",)),
        Row("activations", activation_bytes(shape, micro_tokens, work.row_tokens, cfg.dtype, cfg.gradient_checkpointing),
            ("update",), "one micro-batch"),
        Row("logits block", head_bytes(shape, work.micro_rows * completion, cfg.logits_chunk_mb, width > 0), ("update",)),
        Row("rows to train on", record, ("update", "optimizer"), "ids, log-probs, support"),
    ]  # fmt: skip
    payload = work.rank_rows * completion * 4 * (2 + width)
    host = whole + payload + (_offloaded(cfg, shape, world_size) if on_gpu else 0)
    return Estimate(shape, tuple(rows), tuple(_moved(cfg, shape, work, world_size, payload)), host)


def _offloaded(cfg: Config, shape: Shape, ranks: int) -> float:
    """Bytes of a process that live in CPU memory: master weights, gradients, two moments; under `all` weights too."""
    return 4 * shape.parameters / ranks * {"none": 0, "optimizer": 4, "all": 5}[cfg.offload]


def _moved(cfg: Config, shape: Shape, work: Work, ranks: int, payload: int) -> Iterator[Row]:
    """Bytes that one process sends in a step, worst case."""
    whole, updates = 4 * shape.parameters, updates_per_step(cfg)
    stage = cfg.zero_stage if cfg.backend == "deepspeed" else 0
    backwards = updates * work.micro_batches
    if stage < 3:
        times = backwards if stage == 2 else updates
        yield Row("gradients, all-reduce", times * all_reduce(whole, ranks), (), f"{times} x")
    if stage in (1, 2):
        yield Row("weights, all-gather", updates * one_way(whole, ranks), (), f"{updates} x")
    if stage == 3:
        yield Row("weights, forward and backward", 2 * backwards * one_way(whole, ranks), (), f"{2 * backwards} x")
        yield Row("gradients, reduce-scatter", backwards * one_way(whole, ranks), (), f"{backwards} x")
        yield Row("weights, for the rollout", one_way(whole, ranks), (), "once")
    yield Row("exchange of rows", one_way(payload, ranks), (), "gloo, CPU memory")


REMEDIES: tuple[tuple[str, tuple[Any, ...]], ...] = (  # settings to try, the cheapest first
    ("rollout_chunk_rows", (32, 16, 8, 4, 1)),
    ("micro_batch_tokens", (4096, 2048, 1024, 1)),
    ("gradient_checkpointing", (True,)),
    ("logits_chunk_mb", (64,)),
    ("zero_stage", (1, 2, 3)),
    ("offload", ("optimizer", "all")),
)


def changed(cfg: Config, name: str, value: Any) -> Config | None:
    """The config with one setting made leaner, and what it implies; None where it is as lean already.

    >>> changed(Config(), "zero_stage", 2).backend
    'deepspeed'
    """
    now, deepspeed = getattr(cfg, name), cfg.backend == "deepspeed"
    if name == "zero_stage":
        leaner = not deepspeed or value > now
        return dataclasses.replace(cfg, backend="deepspeed", zero_stage=value, deterministic=False) if leaner else None
    if name == "offload":
        usable = deepspeed and cfg.zero_stage >= (3 if value == "all" else 1) and now in ("none", "optimizer")
        return dataclasses.replace(cfg, offload=value) if usable and now != value else None
    return dataclasses.replace(cfg, **{name: value}) if (value and not now if value is True else value < now) else None


def advise(cfg: Config, model_config: PreTrainedConfig, ranks: int, limit: float) -> list[tuple[str, Any]]:
    """Settings and values that make the run fit: one if one is enough, else several in turn; [] if none do."""
    peak = lambda candidate: estimate(candidate, model_config, ranks).peak()  # noqa: E731
    tries = [(name, value) for name, values in REMEDIES for value in values]
    for name, value in tries:
        candidate = changed(cfg, name, value)
        if candidate is not None and peak(candidate) <= limit:
            return [(name, value)]
    taken: dict[str, Any] = {}
    for name, value in tries:
        candidate = changed(cfg, name, value)
        if candidate is not None and peak(candidate) <= peak(cfg):
            cfg, taken[name] = candidate, value
            if peak(cfg) <= limit:
                return list(taken.items())
    return []


def report(cfg: Config, model_config: PreTrainedConfig, gpus: int, memory_gb: float, per_node: int) -> str:
    """The text that the command prints."""
    found, limit = estimate(cfg, model_config, gpus), memory_gb * GB
    stage = f" zero_stage {cfg.zero_stage}" if cfg.backend == "deepspeed" else ""
    unit = "process" if cfg.device == "cpu" else "GPU"
    lines = [f"{cfg.model}: {found.shape.parameters / 1e9:.3f} billion parameters; {cfg.backend}{stage}, {gpus} x {unit}",
             "", f"{f'memory per {unit}, GB':30}" + "".join(f"{phase:>11}" for phase in PHASES)]  # fmt: skip
    for row in sorted(found.rows, key=lambda row: -row.bytes):
        cells = [f"{row.bytes / GB:11.2f}" if phase in row.phases else f"{'-':>11}" for phase in PHASES]
        lines.append(f"{row.name:30}" + "".join(cells) + (f"  {row.why}" if row.why else ""))
    lines.append(f"{'together':30}" + "".join(f"{found.at(phase) / GB:11.2f}" for phase in PHASES))
    lines += ["", f"{'bytes sent per step, GB':30}"]
    lines += [f"{row.name:30}{row.bytes / GB:11.2f}  {row.why}" for row in found.moved]
    lines += ["", f"CPU memory per node: at least {min(gpus, per_node) * found.host_bytes / GB:.1f} GB, every process "
              "loads whole weights there first", ""]  # fmt: skip
    peak = found.peak()
    if peak <= limit:
        tight = ", tight: CUDA, NCCL and fragmentation are not counted" if peak > 0.9 * limit else ""
        return "\n".join([*lines, f"FITS: {peak / GB:.1f} of {memory_gb:g} GB ({found.worst}){tight}"])
    lines.append(f"DOES NOT FIT: {peak / GB:.1f} GB needed ({found.worst}), {memory_gb:g} GB there.")
    lines += [f"  {row.name} alone: {row.bytes / GB:.1f} GB, more than one {unit} has." for row in found.rows
              if row.bytes > limit]  # fmt: skip
    remedy = advise(cfg, model_config, gpus, limit)
    if remedy:
        backend = " --backend deepspeed" if cfg.backend != "deepspeed" and "zero_stage" in dict(remedy) else ""
        lines.append("  It fits with" + backend + "".join(f" --{k} {str(v).lower()}" for k, v in remedy))
    else:
        lines.append(f"  No setting makes it fit on {gpus}: a smaller model, or more memory per {unit}.")
    return "\n".join(lines)


def _number(argv: list[str], name: str, default: str | None, kind: type) -> tuple[Any, list[str]]:
    """Take `--name value` or `--name=value` out of argv. Raises UserError."""
    rest, given = [], default
    args = iter(argv)
    for arg in args:
        if arg == f"--{name}":
            given = next(args, "")
        elif arg.startswith(f"--{name}="):
            given = arg.split("=", 1)[1]
        else:
            rest.append(arg)
    try:
        value = kind(given or "")
    except ValueError:
        value = 0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: must be a number > 0, got {given!r}. Say --{name} 8, for example.")
    return value, rest


def main(argv: list[str]) -> int:
    """Print the estimate. Returns the exit code."""
    try:
        gpus, argv = _number(argv, "gpus", "1", int)
        memory, argv = _number(argv, "gpu_memory", "80", float)
        per_node, argv = _number(argv, "gpus_per_node", "8", int)
        cfg, notice = load_config(argv)
        if cfg.backend == "single" and gpus > 1:
            raise UserError(f"backend: single is for one process, got --gpus {gpus}. Use ddp or deepspeed.")
        quiet()
        assert cfg.model is not None
        try:
            model_config = AutoConfig.from_pretrained(resolve(cfg.model), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model: no config could be read from {cfg.model!r}: {reason}") from None
        print(*filter(None, [notice, report(cfg, model_config, gpus, memory, per_node)]), sep="\n")
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
