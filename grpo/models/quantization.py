"""bitsandbytes: a frozen model in 4 bits (QLoRA, arXiv 2305.14314), and AdamW with 8-bit moments.

Both run on CUDA and on the CPU; paged moments need CUDA's unified memory. bitsandbytes is an optional dependency:
pip install 'grpo-torchrun[quant]'. Weights are NF4 in blocks of 64 with 8-bit scales, about 4.13 bits each.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.errors import UserError

LIBRARY = "bitsandbytes"
MARK = "is_loaded_in_4bit"
MIN_8BIT_ELEMENTS = 4096  # bitsandbytes keeps smaller parameters' moments in fp32
# Names of moments in checkpoints -> names in bitsandbytes' optimizer state.
MOMENTS_8BIT = {"codes1": "state1", "codes2": "state2", "absmax1": "absmax1", "absmax2": "absmax2"}
MOMENTS_FP32 = {"exp_avg": "state1", "exp_avg_sq": "state2"}


@contextmanager
def no_kernel_download() -> Iterator[None]:
    """Import bitsandbytes inside: on some CPUs it would download a kernel from the hub, through `kernels`."""
    logger = logging.getLogger(LIBRARY)
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def library(setting: str) -> Any:
    """Import bitsandbytes. Raises UserError, naming the setting that needs it, when it is missing."""
    try:
        with no_kernel_download():
            import bitsandbytes
            import bitsandbytes.optim
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{setting}: needs bitsandbytes, which could not be imported ({reason}). "
            "pip install 'grpo-torchrun[quant]', or leave the setting out."
        ) from None
    return bitsandbytes


def quantize(model: PreTrainedModel, compute: torch.dtype = torch.float32) -> None:
    """Replace the linear layers, except the head, by 4-bit layers; weights are rounded when moved to their device.

    compute: the dtype of their products. Raises UserError.
    """
    four_bit = library("load_in_4bit").nn
    head = model.get_output_embeddings()
    found = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    if not found:
        raise UserError(
            f"load_in_4bit: {type(model).__name__} has no linear layers but its head. Leave the setting out."
        )
    for name, layer in found:
        new = four_bit.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        new.weight = four_bit.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        # bitsandbytes would repack weights for a special kernel in sampling, with other numbers than in training.
        new.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    model.requires_grad_(False)
    setattr(model, MARK, True)  # read by peft


def is_4bit(module: nn.Module) -> bool:
    """Whether a layer holds its weight in 4 bits."""
    return type(module).__name__ == "Linear4bit"


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace 4-bit layers by plain linear layers with the same weights in fp32, in place."""
    for name, layer in [(name, m) for name, m in model.named_modules() if is_4bit(m)]:
        functional = library("load_in_4bit").functional
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.float(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    if hasattr(model, MARK):
        delattr(model, MARK)
    return model


def make_adamw(kind: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments and a scale for each block of 256. Raises UserError where it cannot run."""
    paged = kind == "paged_adamw_8bit"
    on_cpu = any(p.device.type == "cpu" for group in groups for p in group["params"])
    if paged and on_cpu:
        raise UserError("optimizer: paged_adamw_8bit needs CUDA's unified memory, got cpu. Use adamw_8bit.")
    optim = library("optimizer").optim
    optimizer: torch.optim.Optimizer = (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **settings)
    return optimizer


def moments_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """Name in checkpoints -> tensor of a parameter's state, without rounding: 8-bit codes stay codes."""
    names = MOMENTS_8BIT if "absmax1" in state else MOMENTS_FP32
    return {name: state[state_name] for name, state_name in names.items() if state_name in state}


def fill_moments(optimizer: Any, parameter: nn.Parameter, read: Any, name: str, updates: int) -> None:
    """Restore a parameter's state. read(name, moment, start, length): see grpo/training/backends/."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, one in enumerate(group["params"]):
            if one is parameter:
                optimizer.state[parameter].clear()
                optimizer.init_state(group, parameter, group_index, index)
    state = optimizer.state[parameter]
    state["step"] = updates
    for moment, tensor in moments_of(state).items():
        tensor.copy_(read(name, moment, 0, tensor.numel()).view_as(tensor).to(tensor.dtype))
