"""Says what a run will need, before anything loads: memory of each GPU, bytes sent in each step, what to change.

    python -m grpo.plan --config F [--key value ...] --gpus 8 --gpu_memory 80 [--gpus_per_node 8]

Only the model's config is read. GB are 10^9 bytes. memory.py holds the formulas, docs/scaling.md explains them.
"""

import dataclasses
import logging
import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from grpo.config.command_line import load_config
from grpo.config.settings import Config, find_path
from grpo.errors import UserError, warn
from grpo.models.checks import quiet
from grpo.models.loading import resolve
from grpo.models.lora_checks import is_adapter
from grpo.models.lora_files import base_of
from grpo.plan.memory import PHASES, Shape, estimate, estimate_shape
from grpo.plan.model_size import held

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
    if name.endswith("_offload") and (cfg.device == "cpu" or (name[0] == "r" and (not cfg.beta or cfg.lora_r))):
        return None
    return dataclasses.replace(cfg, **{name: value}) if (value and not now if value is True else value < now) else None


def advise(cfg: Config, shape: Shape, ranks: int, limit: float) -> list[tuple[str, Any]]:
    """Settings and values that make the run fit: one if one is enough, else several in turn; [] if none do."""
    peak = lambda candidate: estimate_shape(candidate, shape, ranks).peak()  # noqa: E731
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
    billions = f"{found.shape.parameters / 1e9:.3f} billion parameters"
    if cfg.lora_r:
        billions += f", {held(cfg, found.shape).trained / 1e6:.1f} million trained"
    lines = [
        f"{cfg.model}: {billions}; {cfg.backend}{stage}, {gpus} x {unit}",
        "",
        f"{f'memory per {unit}, GB':30}" + "".join(f"{phase:>11}" for phase in PHASES),
    ]
    for row in sorted(found.rows, key=lambda row: -row.bytes):
        cells = [f"{row.bytes / GB:11.2f}" if phase in row.phases else f"{'-':>11}" for phase in PHASES]
        lines.append(f"{row.name:30}" + "".join(cells) + (f"  {row.why}" if row.why else ""))
    lines.append(f"{'together':30}" + "".join(f"{found.at(phase) / GB:11.2f}" for phase in PHASES))
    lines += ["", f"{'bytes sent per step, GB':30}"]
    lines += [f"{row.name:30}{row.bytes / GB:11.2f}  {row.why}" for row in found.moved]
    lines += [
        "",
        f"CPU memory per node: at least {min(gpus, per_node) * found.host_bytes / GB:.1f} GB, every process "
        "loads whole weights there first",
        "",
    ]
    peak = found.peak()
    if peak <= limit:
        tight = ", tight: CUDA, NCCL and fragmentation are not counted" if peak > 0.9 * limit else ""
        return "\n".join([*lines, f"FITS: {peak / GB:.1f} of {memory_gb:g} GB ({found.worst}){tight}"])
    lines.append(f"DOES NOT FIT: {peak / GB:.1f} GB needed ({found.worst}), {memory_gb:g} GB there.")
    lines += [
        f"  {row.name} alone: {row.bytes / GB:.1f} GB, more than one {unit} has."
        for row in found.rows
        if row.bytes > limit
    ]
    remedy = advise(cfg, found.shape, gpus, limit)
    if remedy:
        backend = " --backend deepspeed" if cfg.backend != "deepspeed" and "zero_stage" in dict(remedy) else ""
        lines.append("  It fits with" + backend + "".join(f" --{k} {str(v).lower()}" for k, v in remedy))
    else:
        lines.append(f"  No setting makes it fit on {gpus}: a smaller model, or more memory per {unit}.")
        lines += _with_adapters(cfg, found.shape, gpus)
    return "\n".join(lines)


def _with_adapters(cfg: Config, shape: Shape, gpus: int) -> list[str]:
    """What training an adapter would need instead: another training, so it is said and not advised."""
    if cfg.lora_r:
        return []
    smaller = dataclasses.replace(cfg, lora_r=16, reference_offload=False)
    four_bit = dataclasses.replace(smaller, backend="ddp", offload="none", deepspeed_config=None, load_in_4bit=True)
    needs = [estimate_shape(each, shape, gpus).peak() / GB for each in (smaller, four_bit)]
    return [
        f"  An adapter alone (--lora_r 16) needs {needs[0]:.1f} GB; on 4-bit weights (--load_in_4bit true, "
        f"--backend ddp) {needs[1]:.1f} GB."
    ]


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
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: the error says enough
        assert cfg.model is not None
        try:
            path = find_path(cfg.model)
            name = base_of(path) if path is not None and is_adapter(path) else cfg.model
            model_config = AutoConfig.from_pretrained(resolve(name, weights=False), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model: no config could be read from {cfg.model!r}: {reason}") from None
        print(*filter(None, [notice, report(cfg, model_config, gpus, memory, per_node)]), sep="\n")
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    return 0
