"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) sharded over ranks.

ZeRO (arXiv 1910.02054) averages gradients over ranks; the loss is multiplied by the number of ranks, so that the
average is our sum. DeepSpeed computes the norm over all ranks and drops the step on every rank when it is not finite;
at stage 0, where it does not, `step` below does.

Weights and optimizer state are fp32 at every stage, as in ddp.py; bf16 is the arithmetic of the forward (autocast).
DeepSpeed's own checkpoints are pickle and are not used: moments are written and read as named pieces.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grpo.config.names import find_path
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.runtime.distributed import World
from grpo.training.backends import MOMENTS, Piece, ReadMoment
from grpo.training.backends.ddp import adam_settings, decay_groups, set_rate, trainable
from grpo.types import MicroBatch

OURS = {  # key that a DeepSpeed JSON may not set -> our setting for it
    "optimizer": "lr, adam_beta1, adam_beta2, weight_decay",
    "scheduler": "lr_schedule, warmup_steps, warmup_ratio, min_lr_ratio",
    "fp16": "dtype (fp32 or bf16)",
    "bf16": "dtype (fp32 or bf16)",
    "amp": "dtype (fp32 or bf16)",
    "data_types": "dtype (fp32 or bf16)",
    "torch_autocast": "dtype (fp32 or bf16)",
}


def deepspeed_config(cfg: Config) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON or ours, `auto` filled in. Raises UserError on contradictions.

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
                f"Use --zero_stage {theirs['stage']}, or write auto."
            )
        for key, value in list(theirs.items()):
            if value == "auto":  # sizes that other trainers fill from the model: DeepSpeed's defaults are used
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
    """Import DeepSpeed, only here because the import takes seconds and prints. Raises UserError."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"backend: deepspeed could not be imported ({error}). pip install deepspeed, or use ddp."
        ) from None
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # DeepSpeed's calls, not the user's
    for op in deepspeed.ops.__compatible_ops__:
        if "shm" in op:  # it would be compiled at start, and only inference uses it
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
        if not torch.distributed.is_initialized():  # one process: DeepSpeed needs a group also then
            os.environ.setdefault("LOCAL_RANK", "0")
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self.engine, self.optimizer, _, _ = self.deepspeed.initialize(model=scorer, optimizer=inner, config=settings)

    def score(self, micro: MicroBatch) -> Tensor:
        return self.engine(micro)

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; DeepSpeed reduces at the last one (stage 2 and 3: at each one)."""
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
        """Not possible: the backward is a collective."""
        raise NotImplementedError("gradients of a sharded backend cannot be dropped by one rank")

    def local_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Weights, also frozen ones, or this rank's shards; flat fp32 masters and their optimizer state."""
        for name, parameter in self.model.named_parameters():
            yield name, (getattr(parameter, "ds_tensor") if self.stage == 3 else parameter).detach()  # noqa: B009
        for i, (flat, state) in enumerate(self._adamw.state.items()):
            if self.stage > 0:
                yield f"master weights, part {i}", flat.detach()
            yield from ((f"{moment}, part {i}", state[moment]) for moment in MOMENTS if moment in state)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the trained weights, under stage 3 gathered one parameter at a time."""
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
        """Load this rank's part of each parameter's moments."""
        if updates == 0:
            return
        # zero moments for every tensor that AdamW steps: DeepSpeed allocates none before its first step
        flats = [parameter for group in self._adamw.param_groups for parameter in group["params"]]
        if self.stage == 3:  # the groups hold one sub-group at a time; the keys are the flat masters
            flats += self.optimizer.fp32_partitioned_groups_flat
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._adamw.state[flat] = {"step": torch.tensor(float(updates)), **moments}
        # then this rank's pieces are copied into them
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                for piece in self._pieces(name, parameter, moment):
                    piece.values.copy_(read(name, moment, piece.start, piece.values.numel()))

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """torch's optimizer, within DeepSpeed's from stage 1 on."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _pieces(self, name: str, parameter: torch.nn.Parameter, moment: str) -> Iterable[Piece]:
        """This rank's part of one moment of a parameter, as views into the optimizer's state: one piece or none."""
        state = self._adamw.state
        if self.stage == 0:
            # every rank has all moments: parameter i is written by rank i modulo W
            owner = list(self.parameters).index(name) % self.world.size
            if owner == self.world.rank and moment in state.get(parameter, {}):
                yield Piece(name, moment, 0, state[parameter][moment].detach().view(-1))
        elif self.stage < 3:
            # weights are whole, moments flat and cut over ranks: DeepSpeed maps a weight to the part on this rank
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # no part of it is on this rank
                return
            flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            if moment in state.get(flat, {}):
                in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                values = state[flat][moment].view(-1).narrow(0, in_flat.start, in_flat.numel)
                yield Piece(name, moment, in_parameter.start, values)
        else:
            # every rank has an equal part of each parameter, at `offset` of a flat tensor; the last ones are padded
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            start = self.world.rank * length
            count = max(0, min(length, self.shapes[name].numel() - start))  # without padding
            if count and moment in state.get(flat, {}):
                yield Piece(name, moment, start, state[flat][moment].view(-1).narrow(0, int(offset), count))
