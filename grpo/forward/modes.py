"""Training mode for the modules that need it; everything else stays in inference mode.

Sampling, scoring and training must compute the same function, and much reads `training`: dropout, layer drop, the noise
and even the choice of experts of routers. Two things work in training mode only: checkpointed layers, and the dropout
of an adapter (lora_dropout, marked `needs_training_mode`).
"""

from torch import nn


def set_mode(model: nn.Module, training: bool, dropout: bool = True) -> None:
    """Inference mode, and with `training` training mode for those modules alone. dropout: False leaves it out."""
    for module in model.modules():
        is_dropout = dropout and getattr(module, "needs_training_mode", False)
        module.training = training and (is_dropout or getattr(module, "gradient_checkpointing", False))
