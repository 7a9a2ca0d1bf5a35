"""Arguments that a model's forward takes: those of architectures differ."""

import inspect
from typing import Any

from torch import nn


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name."""
    return name in inspect.signature(module.forward).parameters


def accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the module's forward accepts, by name or as one of any others."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
