"""A reference that follows the policy: the settings reference_sync_steps and reference_mixup.

    ref  <-  a * policy + (1 - a) * ref      after every reference_sync_steps steps, a = reference_mixup, every tensor

TR-DPO, arXiv 2404.09656: a soft update, and with a = 1 a hard one. With a = 1 it is also the iterative GRPO of
DeepSeekMath, arXiv 2402.03300, algorithm 1, which replaces the reference. TRL calls it sync_ref_model.

Every rank has a whole reference and renews it itself from the policy's stream of weights, tensor by tensor: where
weights are sharded, no second whole copy exists. All ranks read the same values, so their references stay equal.
Checkpoints keep the reference as trainer/reference.safetensors, because the starting model no longer gives it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.training.policy import Policy
from grpo.types import Extra

REFERENCE = "reference"  # its name among Policy.extras, and of its file


@dataclass(frozen=True)
class KeptReference(Extra):
    """The reference as a part of checkpoints."""

    model: nn.Module

    def parameters(self) -> dict[str, Tensor]:
        """By name, tied ones once; buffers are never trained."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """A copy, on CPU."""
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in self.parameters().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the reference. Raises ValueError for tensors of another model, or not finite."""
        parameters = self.parameters()
        if tensors.keys() != parameters.keys():
            different = sorted(tensors.keys() ^ parameters.keys())
            raise ValueError(f"{len(different)} names are not those of the model, such as {different[0][:80]}")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape or tensors[name].dtype != parameter.dtype:
                raise ValueError(f"{name[:80]} has another shape or type")
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{name[:80]} holds NaN or Inf")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def keep_reference(policy: Policy) -> None:
    """Let checkpoints keep the reference. Call it before the policy's state is restored."""
    assert policy.reference is not None
    policy.extras[REFERENCE] = KeptReference(policy.reference.model)


@torch.no_grad()
def renew_reference(policy: Policy, step: int) -> None:
    """Mix the policy into the reference where it is due after `step` steps. Every rank must call it."""
    every, mixup = policy.cfg.reference_sync_steps, policy.cfg.reference_mixup
    if not every or step % every:
        return
    assert policy.reference is not None
    parameters = dict(policy.reference.model.named_parameters())
    for name, tensor in policy.weights():
        parameters[name].mul_(1 - mixup).add_(tensor.to(parameters[name].device), alpha=mixup)
