"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) sharded over ranks.

ZeRO (arXiv 1910.02054) averages gradients over ranks; the loss is multiplied by the number of ranks, so that
the average is our sum. The norm is DeepSpeed's, over all ranks, and a norm that is not finite makes it drop
the step on every rank by itself; stage 0, where it would not, is treated here.

Weights and optimizer state are fp32 on every stage, as on the other backend; bf16 is the arithmetic of the
forward (autocast). DeepSpeed's own checkpoints are pickle and are not used: moments leave and enter as
named pieces.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grpo.config.settings import Config, find_path
from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.runtime.distributed import World
from grpo.training.backends import MOMENTS, Piece, ReadMoment
from grpo.training.backends.ddp import adam_settings, decay_groups, set_rate, trainable
from grpo.types import MicroBatch

OURS = {  # what a DeepSpeed JSON may not say, and the setting that says it here
    "optimizer": "lr, adam_beta1, adam_beta2, weight_decay",
    "scheduler": "lr_schedule, warmup_ratio",
    "fp16": "dtype (fp32 or bf16)",
    "bf16": "dtype (fp32 or bf16)",
    "amp": "dtype (fp32 or bf16)",
    "data_types": "dtype (fp32 or bf16)",
    "torch_autocast": "dtype (fp32 or bf16)",
}


def deepspeed_config(cfg: Config) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: the user's, or ours, with `auto` filled in. Raises UserError on contradictions.

    >>> deepspeed_config(Config(zero_stage=3, offload="optimizer"))["zero_optimization"]["offload_optimizer"]
    {'device': 'cpu'}
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    required = {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by tokens, outside DeepSpeed
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.max_grad_norm,
    }
    if cfg.deepspeed_config is None:
        settings: dict[str, Any] = {"zero_optimization": zero}
    else:
        settings = _read(cfg.deepspeed_config)
        for key, ours in OURS.items():
            if settings.get(key, "auto") != "auto" and _enabled(settings[key]):
                raise UserError(
                    f"deepspeed_config: {key} contradicts the run's own settings: leave it out, use {ours}."
                )
            settings.pop(key, None)
        theirs = settings.setdefault("zero_optimization", {})
        if theirs.get("stage", "auto") == "auto":
            theirs["stage"] = cfg.zero_stage
        elif theirs["stage"] != cfg.zero_stage:
            raise UserError(
                f"deepspeed_config: zero_optimization.stage is {theirs['stage']}, zero_stage is {cfg.zero_stage}. "
                f"Say --zero_stage {theirs['stage']}, or write auto."
            )
        for key, value in list(theirs.items()):
            if value == "auto":  # sizes that other trainers fill from the model: DeepSpeed's defaults serve
                del theirs[key]
    for key, value in required.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"deepspeed_config: {key} must be {value} or auto, got {settings[key]}. "
                "The batch is batch_size x gradient_accumulation_steps; clipping is max_grad_norm."
            )
    settings.pop("train_batch_size", None)
    return {**settings, **required, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _enabled(section: Any) -> bool:
    return not (isinstance(section, dict) and section.get("enabled") in (False, "auto"))


def _read(name: str) -> dict[str, Any]:
    path = find_path(name)
    if path is None:
        raise UserError(f"deepspeed_config: no such file {name!r}. Give a JSON file, or leave it out.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed_config: {name} is not JSON ({error}).") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed_config: {name} must hold a JSON object, got {type(settings).__name__}.")
    return settings


def _import(world: World) -> Any:
    """DeepSpeed, imported late: it is slow, noisy and not needed without this backend."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"backend: deepspeed could not be imported ({error}). pip install deepspeed, or use ddp."
        ) from None
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # its calls, not the user's
    for op in deepspeed.ops.__compatible_ops__:
        if "shm" in op:  # would be compiled at start and serves inference alone
            deepspeed.ops.__compatible_ops__[op] = False
    return deepspeed


def open_backend(cfg: Config, world: World, scorer: Scorer) -> "DeepSpeed":
    """See grpo/training/backends/__init__.py."""
    return DeepSpeed(scorer, cfg, world)


class DeepSpeed:
    """AdamW behind a DeepSpeed engine."""

    even_work = True  # forward, backward and head are collectives under stage 3, the backward under stage 2

    def __init__(self, scorer: Scorer, cfg: Config, world: World):
        settings = deepspeed_config(cfg)
        size = sum(parameter.numel() for parameter in trainable(scorer).values())
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # DeepSpeed's 5e8 elements are 2 GB of fp32
            settings["zero_optimization"].setdefault(bucket, min(size, 2**26))
        self.deepspeed = _import(world)
        self.world = world
        self.stage = int(settings["zero_optimization"]["stage"])
        self.model = scorer.model
        self.parameters = trainable(scorer)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        inner = torch.optim.AdamW(decay_groups(self.parameters, cfg.weight_decay), **adam_settings(cfg))
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        if not torch.distributed.is_initialized():  # one process: DeepSpeed wants a group all the same
            os.environ.setdefault("LOCAL_RANK", "0")
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self.engine, self.optimizer, _, _ = self.deepspeed.initialize(model=scorer, optimizer=inner, config=settings)

    def score(self, micro: MicroBatch) -> Tensor:
        """Log-probs [B, T]."""
        return self.engine(micro)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; DeepSpeed reduces at the last one (stage 2 and 3: at each)."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float, max_norm: float) -> float:
        """Clip and step; DeepSpeed drops the step when the norm is not finite."""
        set_rate(self.optimizer, lr)
        if self.stage == 0:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
            if math.isfinite(norm):
                self.engine.step()
            self.engine.optimizer.zero_grad(set_to_none=True)
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return math.nan if self.optimizer.overflow or norm < 0 else norm

    def forget(self) -> None:
        """Never asked for: backward is a collective here."""
        raise NotImplementedError("gradients of a sharded backend cannot be dropped by one rank")

    def held(self) -> Iterable[tuple[str, Tensor]]:
        """Weights, frozen ones too, or this rank's shards; flat fp32 masters, and the optimizer state beside them."""
        for name, parameter in self.model.named_parameters():
            yield name, (getattr(parameter, "ds_tensor") if self.stage == 3 else parameter).detach()  # noqa: B009
        inner = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        for i, (flat, state) in enumerate(inner.state.items()):
            if self.stage > 0:
                yield f"master weights, part {i}", flat.detach()
            yield from ((f"{moment}, part {i}", state[moment]) for moment in MOMENTS if moment in state)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the current weights, under stage 3 gathered one parameter at a time."""
        for name, parameter in self.parameters.items():
            if self.stage < 3:
                yield name, parameter.detach()
            else:
                with self.deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach().clone()

    def moments(self) -> Iterable[Piece]:
        """This rank's part of each parameter's moments."""
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                yield from self._pieces(name, parameter, moment)

    def load_moments(self, read: ReadMoment, updates: int) -> None:
        """Take this rank's part of each parameter's moments."""
        if updates == 0:
            return
        inner = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        for flat in (parameter for group in inner.param_groups for parameter in group["params"]):
            inner.state[flat] = {"step": torch.tensor(float(updates))} | {m: torch.zeros_like(flat) for m in MOMENTS}
        if self.stage == 3:  # its inner groups hold one sub-group at a time; the flat masters are the keys
            for flat in self.optimizer.fp32_partitioned_groups_flat:
                inner.state[flat] = {"step": torch.tensor(float(updates))} | {
                    m: torch.zeros_like(flat) for m in MOMENTS
                }
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                for piece in self._pieces(name, parameter, moment):
                    piece.values.copy_(read(name, moment, piece.start, piece.values.numel()))

    def _pieces(self, name: str, parameter: torch.nn.Parameter, moment: str) -> Iterable[Piece]:
        """Views into the optimizer's own state."""
        inner = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        if self.stage == 0:
            state = inner.state.get(parameter, {})
            owner = list(self.parameters).index(name) % self.world.size
            if moment in state and owner == self.world.rank:
                yield Piece(name, moment, 0, state[moment].detach().view(-1))
        elif self.stage < 3:
            mapping = getattr(parameter, "_hp_mapping", None)  # None: this rank holds none of it
            flat = (
                None if mapping is None else self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            )
            if mapping is not None and moment in inner.state.get(flat, {}):
                address = mapping.hp_fragment_address
                values = inner.state[flat][moment].view(-1).narrow(0, address.start, address.numel)
                yield Piece(name, moment, mapping.lp_fragment_address.start, values)
        else:
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            start = self.world.rank * length  # every rank holds an equal part, the last one padded
            kept = max(0, min(length, self.shapes[name].numel() - start))
            if kept and moment in inner.state.get(flat, {}):
                yield Piece(name, moment, start, inner.state[flat][moment].view(-1).narrow(0, int(offset), kept))
