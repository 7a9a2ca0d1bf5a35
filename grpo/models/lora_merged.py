"""An adapter's model as whole weights, W + scale B A, one tensor at a time: for an engine that holds no adapter."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from grpo.models.lora_files import ACTIVE


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without an adapter, weight) of each weight. Every rank must iterate to the end.

    Where weights are sharded (ZeRO stage 3), those of one layer are gathered at a time.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, last = name.rpartition(".base_layer.")
        layer = layers.get(owner) if last == "weight" else None
        adapter = [] if layer is None else [layer.lora_A[ACTIVE].weight, layer.lora_B[ACTIVE].weight]
        with _whole([parameter, *adapter]):
            weight = parameter.detach()
            if layer is not None:
                weight = weight + layer.get_delta_weight(ACTIVE).detach().to(weight.dtype)
            elif hasattr(parameter, "ds_id"):
                weight = weight.clone()
        yield name.replace(".base_layer.", "."), weight


def _whole(parameters: list[Tensor]) -> AbstractContextManager[object]:
    """Gather parameters that ZeRO has sharded."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed  # late: it takes seconds

    return deepspeed.zero.GatheredParameters(parameters)
