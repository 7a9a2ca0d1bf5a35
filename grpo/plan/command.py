"""Prints what a run will need, before anything loads: memory of each GPU, bytes sent per step, settings to change.

    python -m grpo.plan --config F [--key value ...] --gpus 8 --gpu_memory 80 [--gpus_per_node 8]

Only the model's config is read. GB are 10^9 bytes. memory.py holds the formulas, docs/scaling.md explains them.
"""

import dataclasses
import logging
import math
from functools import partial
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from grpo.config.command_line import load_config
from grpo.config.messages import OneLineParser
from grpo.config.names import find_path, model_name
from grpo.config.settings import Config, is_deepspeed
from grpo.errors import UserError, warn
from grpo.models.checks import quiet
from grpo.models.loading import resolve
from grpo.models.lora_checks import is_adapter
from grpo.models.lora_files import base_of
from grpo.plan.memory import MEMORY_PHASES, estimate, estimate_for
from grpo.plan.model_size import ModelSize, model_states

GB = 10**9
REMEDIES: tuple[tuple[str, tuple[Any, ...]], ...] = (  # settings to try, the cheapest first
    ("rollout_chunk_rows", (32, 16, 8, 4, 1)),
    ("micro_batch_tokens", (4096, 2048, 1024, 1)),
    ("gradient_checkpointing", (True,)),
    ("reference_offload", (True,)),
    ("activation_offload", (True,)),
    ("logits_chunk_mb", (64,)),
    ("zero_stage", (1, 2, 3)),
    ("offload", ("optimizer", "all")),
)


def with_remedy(cfg: Config, name: str, value: Any) -> Config | None:
    """The config with one setting that saves memory, and what it implies; None if it saves nothing or is not usable.

    >>> with_remedy(Config(), "zero_stage", 2).backend
    'deepspeed'
    """
    current = getattr(cfg, name)
    if name == "zero_stage":
        if is_deepspeed(cfg) and value <= current:
            return None
        return dataclasses.replace(cfg, backend="deepspeed", zero_stage=value, deterministic=False)
    if name == "offload":
        min_stage = 3 if value == "all" else 1
        usable = is_deepspeed(cfg) and cfg.zero_stage >= min_stage and current in ("none", "optimizer")
        return dataclasses.replace(cfg, offload=value) if usable and current != value else None
    if name.endswith("_offload") and cfg.device == "cpu":
        return None
    if name == "reference_offload" and (not cfg.beta or cfg.lora_r):  # there is no copy of the model to offload
        return None
    saves = not current if value is True else value < current
    return dataclasses.replace(cfg, **{name: value}) if saves else None


def advise(cfg: Config, size: ModelSize, ranks: int, limit: float) -> list[tuple[str, Any]]:
    """Settings and values that make the run fit: one if one is enough, else several combined; [] if none do."""

    def peak(candidate: Config) -> float:
        return estimate_for(candidate, size, ranks).peak()

    remedies = [(name, value) for name, values in REMEDIES for value in values]
    for name, value in remedies:
        candidate = with_remedy(cfg, name, value)
        if candidate is not None and peak(candidate) <= limit:
            return [(name, value)]
    chosen: dict[str, Any] = {}
    for name, value in remedies:
        candidate = with_remedy(cfg, name, value)
        if candidate is not None and peak(candidate) <= peak(cfg):
            cfg, chosen[name] = candidate, value
            if peak(cfg) <= limit:
                return list(chosen.items())
    return []


def report(cfg: Config, model_config: PreTrainedConfig, gpus: int, memory_gb: float, per_node: int) -> str:
    """The text that the command prints."""
    estimated, limit = estimate(cfg, model_config, gpus), memory_gb * GB
    stage = f" zero_stage {cfg.zero_stage}" if is_deepspeed(cfg) else ""
    unit = "process" if cfg.device == "cpu" else "GPU"
    billions = f"{estimated.size.parameters / 1e9:.3f} billion parameters"
    if cfg.lora_r:
        billions += f", {model_states(cfg, estimated.size).trained / 1e6:.1f} million trained"
    lines = [
        f"{cfg.model}: {billions}; {cfg.backend}{stage}, {gpus} x {unit}",
        "",
        f"{f'memory per {unit}, GB':30}" + "".join(f"{phase:>11}" for phase in MEMORY_PHASES),
    ]
    for entry in sorted(estimated.memory, key=lambda entry: -entry.bytes):
        cells = [f"{entry.bytes / GB:11.2f}" if phase in entry.phases else f"{'-':>11}" for phase in MEMORY_PHASES]
        lines.append(f"{entry.name:30}" + "".join(cells) + (f"  {entry.note}" if entry.note else ""))
    lines.append(f"{'together':30}" + "".join(f"{estimated.at(phase) / GB:11.2f}" for phase in MEMORY_PHASES))
    lines += ["", f"{'bytes sent per step, GB':30}"]
    lines += [f"{entry.name:30}{entry.bytes / GB:11.2f}  {entry.note}" for entry in estimated.traffic]
    lines += [
        "",
        f"CPU memory per node: at least {min(gpus, per_node) * estimated.host_bytes / GB:.1f} GB, every process "
        "loads whole weights there first",
        "",
    ]
    peak = estimated.peak()
    if peak <= limit:
        tight = ", tight: CUDA, NCCL and fragmentation are not counted" if peak > 0.9 * limit else ""
        return "\n".join([*lines, f"FITS: {peak / GB:.1f} of {memory_gb:g} GB ({estimated.worst}){tight}"])
    lines.append(f"DOES NOT FIT: {peak / GB:.1f} GB needed ({estimated.worst}), {memory_gb:g} GB there.")
    lines += [
        f"  {entry.name} alone: {entry.bytes / GB:.1f} GB, more than one {unit} has."
        for entry in estimated.memory
        if entry.bytes > limit
    ]
    remedy = advise(cfg, estimated.size, gpus, limit)
    if remedy:
        backend = " --backend deepspeed" if not is_deepspeed(cfg) and "zero_stage" in dict(remedy) else ""
        lines.append("  It fits with" + backend + "".join(f" --{k} {str(v).lower()}" for k, v in remedy))
    else:
        lines.append(f"  No setting makes it fit on {gpus}: a smaller model, or more memory per {unit}.")
        lines += _with_adapters(cfg, estimated.size, gpus)
    return "\n".join(lines)


def _with_adapters(cfg: Config, size: ModelSize, gpus: int) -> list[str]:
    """Memory with a LoRA adapter. This trains something else, so it is mentioned but not advised."""
    if cfg.lora_r:
        return []
    adapter = dataclasses.replace(cfg, lora_r=16, reference_offload=False)
    four_bit = dataclasses.replace(adapter, backend="ddp", offload="none", deepspeed_config=None, load_in_4bit=True)
    needs = [estimate_for(each, size, gpus).peak() / GB for each in (adapter, four_bit)]
    return [
        f"  An adapter alone (--lora_r 16) needs {needs[0]:.1f} GB; on 4-bit weights (--load_in_4bit true, "
        f"--backend ddp) {needs[1]:.1f} GB."
    ]


def _positive(name: str, kind: type, text: str) -> Any:
    """A number > 0, for argparse. Raises UserError."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: must be a number > 0, got {text!r}. Example: --{name} 8.")
    return value


def main(argv: list[str]) -> int:
    """Print the estimate. Returns the exit code."""
    try:
        parser = OneLineParser("python -m grpo.plan", add_help=False, allow_abbrev=False)
        for name, kind, default in (("gpus", int, 1), ("gpu_memory", float, 80.0), ("gpus_per_node", int, 8)):
            parser.add_argument(f"--{name}", type=partial(_positive, name, kind), default=default, nargs="?", const="")
        args, settings = parser.parse_known_args(argv)
        cfg, notice = load_config(settings)
        if cfg.backend == "single" and args.gpus > 1:
            raise UserError(f"backend: single is for one process, got --gpus {args.gpus}. Use ddp or deepspeed.")
        quiet()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries: the final error is enough
        assert cfg.model is not None
        try:
            path = find_path(cfg.model)
            name = base_of(path) if path is not None and is_adapter(path) else model_name(cfg)
            model_config = AutoConfig.from_pretrained(resolve(name, weights=False), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model: no config could be read from {cfg.model!r}: {reason}") from None
        print(
            *filter(None, [notice, report(cfg, model_config, args.gpus, args.gpu_memory, args.gpus_per_node)]), sep="\n"
        )
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    return 0
