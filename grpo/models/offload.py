"""What leaves the GPU for CPU memory in between: activations until the backward, the reference until it scores."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.settings import Config
from grpo.errors import UserError

SMALL = 2**12  # elements: what is smaller stays where it is


def check_device(cfg: Config, device: torch.device) -> None:
    """Refuse to move to CPU memory what is there already. Raises UserError."""
    for name in ("activation_offload", "reference_offload"):
        if getattr(cfg, name) and device.type == "cpu":
            raise UserError(f"{name}: it moves tensors from a GPU to CPU memory, and the device is cpu. Leave it out.")


class ActivationOffload:
    """Tensors that autograd keeps for the backward, in CPU memory meanwhile. Weights and small ones stay."""

    def __init__(self, model: nn.Module):
        shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        self.weights = shapes | {shape[::-1] for shape in shapes}  # linear layers keep their weight, or its transpose
        self.parked = 0  # bytes moved so far

    def around(self, forward: bool) -> AbstractContextManager[Any]:
        """The context of a forward pass whose activations go to CPU memory; forward False: of one whose do not."""
        return torch.autograd.graph.saved_tensors_hooks(self._park, self._fetch) if forward else nullcontext()

    def _park(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.numel() < SMALL or tuple(tensor.shape) in self.weights:
            return tensor.device, tensor
        away = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        away.copy_(tensor, non_blocking=True)  # in pinned memory, in the order of the stream, as the way back is
        self.parked += away.nbytes
        return tensor.device, away

    @staticmethod
    def _fetch(parked: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = parked
        return tensor.to(device, non_blocking=True)


@contextmanager
def brought(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A frozen model whose home is CPU memory, on the device for a while; its numbers are not copied back."""
    tensors = [*model.parameters(), *model.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
