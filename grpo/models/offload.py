"""Offload to CPU memory: activations between forward and backward, the reference except while it scores."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.settings import Config
from grpo.errors import UserError

SMALL = 2**12  # elements; smaller tensors stay on the device


def check_device(cfg: Config, device: torch.device) -> None:
    """Raises UserError for offload when the device is the CPU itself."""
    for name in ("activation_offload", "reference_offload"):
        if getattr(cfg, name) and device.type == "cpu":
            raise UserError(f"{name}: it moves tensors from a GPU to CPU memory, and the device is cpu. Leave it out.")


class ActivationOffload:
    """Keeps tensors that autograd saves for the backward in CPU memory, except weights and small tensors."""

    def __init__(self, model: nn.Module):
        shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        self.weights = shapes | {shape[::-1] for shape in shapes}  # linear layers save their weight or its transpose
        self.bytes_moved = 0  # so far

    def around(self, forward: bool) -> AbstractContextManager[Any]:
        """The context of a forward pass. forward: offload its activations; False changes nothing."""
        return torch.autograd.graph.saved_tensors_hooks(self._to_cpu, self._to_device) if forward else nullcontext()

    def _to_cpu(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.numel() < SMALL or tuple(tensor.shape) in self.weights:
            return tensor.device, tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        copy.copy_(tensor, non_blocking=True)  # pinned memory; both copies are in stream order
        self.bytes_moved += copy.nbytes
        return tensor.device, copy

    @staticmethod
    def _to_device(saved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = saved
        return tensor.to(device, non_blocking=True)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a frozen model from CPU memory to the device for a while; its values are not copied back."""
    tensors = [*model.parameters(), *model.buffers()]
    on_cpu = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, on_cpu, strict=True):
            tensor.data = data
