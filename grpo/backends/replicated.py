"""Whole weights on every rank: a single process, or data parallel over ranks.

Gradients are summed in flat buckets after the last micro-batch. torch's DistributedDataParallel is not
used: it averages where our contract sums, expects the forward to go through its wrapper (ours calls body
and head apart), and hangs when a rank has no micro-batch.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo.config import Config
from grpo.distributed import World
from grpo.errors import UserError

BUCKET_ELEMENTS = 2**23  # 32 MB of fp32


class Replicated:
    """AdamW on whole fp32 weights."""

    def __init__(self, model: nn.Module, cfg: Config, world: World):
        self.world = world
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]  # norms and biases do not decay
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=cfg.lr,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
        )

    def zero(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""
        loss.backward()

    def reduce(self) -> float:
        """Sum gradients over ranks and return their global norm."""
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a rank without micro-batches adds zeros
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.world.size > 1:
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.view(-1) for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))

    def step(self, lr: float, scale: float) -> None:
        """Scale the gradients and step."""
        for parameter in self.parameters.values():
            if scale != 1.0 and parameter.grad is not None:
                parameter.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Stream the current weights."""
        for name, parameter in self.parameters.items():
            yield name, parameter.detach()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments by parameter name; empty before the first update."""
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put moments back. Raises UserError when names or shapes do not fit."""
        expected = {f"{name}.{key}" for name in self.parameters for key in ("step", "exp_avg", "exp_avg_sq")}
        if state and set(state) != expected:
            odd = sorted(set(state) ^ expected)[:3]
            raise UserError(
                f"checkpoint: optimizer state does not fit the model, first differences {odd}. Use --resume never."
            )
        for name, parameter in self.parameters.items() if state else ():
            moments = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["exp_avg"].shape != parameter.shape:
                raise UserError(f"checkpoint: optimizer state of {name} has shape {tuple(moments['exp_avg'].shape)}, "
                                f"the model's is {tuple(parameter.shape)}. Use --resume never.")  # fmt: skip
            self.optimizer.state[parameter] = {
                "step": moments["step"].cpu().clone(),
                "exp_avg": moments["exp_avg"].to(parameter).clone(),
                "exp_avg_sq": moments["exp_avg_sq"].to(parameter).clone(),
            }


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if buckets[-1] and size + tensor.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
