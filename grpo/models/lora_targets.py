"""Which layers get an adapter: linear layers that text passes through, and that peft can train, save and merge.

A layer is left out when an adapter on it would not be trained, or not be what plain peft makes of the stored files:

    text does not pass through it       vision and audio towers, projectors of images
    it computes no linear map           routers of Phi-MoE and Llama 4, which return a tuple
    its parent reads its weight         out_proj of Mamba's fused kernel, dt_proj of Jamba: the adapter would be skipped
    peft renames it                     in mixtures of experts transformers 5 keeps experts as one 3-D parameter; peft
                                        converts names such as gate_proj for it, those of shared and dense layers too

Experts that are 3-D parameters are no linear layers, and stay frozen.
"""

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo.errors import UserError
from grpo.models.quantization import is_4bit

OUTSIDE = "it is the head or the embeddings"
NO_TEXT = "text does not pass through it"
NOT_LINEAR = "it is no linear layer"
READ_BY_PARENT = "the layer around it reads its weight, so an adapter would be skipped"
RENAMED = "peft converts its name to that of the experts, which are one 3-D parameter"
READ = re.compile(r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|new))")


def choose_targets(model: PreTrainedModel, wanted: str | list[str], config: Any) -> list[str]:
    """Names of the layers that get an adapter; a given list as it stands where it means these layers.

    config: a LoraConfig, for what peft makes of names. Raises UserError for a name that no such layer has.
    """
    reasons = _left_out(model, config)
    fitting = [name for name, reason in reasons.items() if reason is None]
    if isinstance(wanted, str):
        if not fitting:
            raise UserError(f"lora_r: {type(model).__name__} has no linear layer that can be adapted. Train it whole.")
        _notice(model, reasons)
        return fitting
    for target in wanted:
        if not any(is_meant(name, target) for name in fitting):
            found = [reason for name, reason in reasons.items() if is_meant(name, target) and reason is not None]
            modules = any(is_meant(name, target) for name, _ in model.named_modules())
            reason = found[0] if found else NOT_LINEAR if modules else "the model has no such layer"
            allowed = ", ".join(sorted({name.rpartition(".")[2] for name in fitting}))
            raise UserError(
                f"lora_target_modules: {target[:80]!r} cannot get an adapter: {reason}. Use all-linear, or names of "
                f"its linear layers: {allowed[:300]}."
            )
    meant = [name for name, _ in model.named_modules() if any(is_meant(name, target) for target in wanted)]
    return list(wanted) if set(meant) <= set(fitting) else [name for name in meant if name in fitting]


def _notice(model: PreTrainedModel, reasons: dict[str, str | None]) -> None:
    """Say which layers of the text's way all-linear leaves out."""
    left_out: dict[str, set[str]] = {}
    for name, reason in reasons.items():
        if reason not in (None, NO_TEXT, OUTSIDE):
            left_out.setdefault(str(reason), set()).add(name.rpartition(".")[2])
    lines = [f"{', '.join(sorted(names))} ({reason})" for reason, names in left_out.items()]
    if any(parameter.dim() == 3 and ".experts." in name for name, parameter in model.named_parameters()):
        lines.append("experts (they are 3-D parameters, no linear layers)")
    if lines:
        warnings.warn(f"{type(model).__name__}: no adapter on {'; '.join(lines)}.", stacklevel=2)


def is_meant(name: str, target: str) -> bool:
    """Whether peft takes a module of this name for the target.

    >>> is_meant("layers.0.q_proj", "q_proj"), is_meant("layers.0.q_proj", "proj")
    (True, False)
    """
    return name == target or name.endswith(f".{target}")


def refuse_conversion(config: Any, wanted: Any) -> None:
    """Raises UserError when peft made more of the given settings than plain LoRA on linear layers."""
    for key in ("target_parameters", "rank_pattern", "alpha_pattern"):
        value = getattr(config, key, None)
        if value:
            shown = wanted if isinstance(wanted, str) else ", ".join(sorted(map(str, wanted)))
            raise UserError(
                f"lora_target_modules: {shown[:200]}: peft sets {key} {str(sorted(value))[:120]} for this model, which "
                "is not plain LoRA on linear layers and could not be saved. Use all-linear, or names of linear layers."
            )


def _left_out(model: PreTrainedModel, config: Any) -> dict[str, str | None]:
    """Name of each linear layer -> why it gets no adapter; None: it gets one."""
    outside = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    called, linear = _kinds_called(model, layers)
    renamed = {leaf: _renames(model, config, leaf) for leaf in {name.rpartition(".")[2] for name in layers}}
    parents = {type(module): module for module in (model.get_submodule(name.rpartition(".")[0]) for name in layers)}
    read = {kind: _read_by(module) for kind, module in parents.items()}
    reasons: dict[str, str | None] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        if id(layers[name]) in outside:
            reasons[name] = OUTSIDE
        elif not {_kind(name), _kind(parent)} & called:
            reasons[name] = NO_TEXT
        elif leaf in read[type(model.get_submodule(parent))]:
            reasons[name] = READ_BY_PARENT
        elif _kind(name) not in called:
            reasons[name] = NO_TEXT
        elif _kind(name) not in linear:
            reasons[name] = NOT_LINEAR
        else:
            reasons[name] = RENAMED if renamed[leaf] else None
    return reasons


def _kind(name: str) -> str:
    """A layer's name without the indices of blocks and experts, not all of which a short text passes through."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


@torch.no_grad()
def _kinds_called(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """The kinds of modules that a forward of a few tokens calls, and those of `layers` that compute a linear map."""
    called: set[str] = set()
    linear: set[str] = set()

    def record(name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        called.add(_kind(name))
        if name not in layers:
            return
        if type(module).forward in (nn.Linear.forward, Conv1D.forward) or is_4bit(module):
            linear.add(_kind(name))
        elif isinstance(output, Tensor) and len(args) == 1 and isinstance(args[0], Tensor):
            expected = nn.functional.linear(args[0], module.weight, module.bias)
            if expected.shape == output.shape and torch.allclose(expected, output, rtol=1e-3, atol=1e-4):
                linear.add(_kind(name))

    hooks = [module.register_forward_hook(functools.partial(record, name)) for name, module in model.named_modules()]
    try:
        model(input_ids=torch.arange(8, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return called, linear


def _read_by(parent: nn.Module) -> set[str]:
    """Names of the layers whose weights the source of the module around them reads."""
    if getattr(parent, "slow_but_exact", None) is False:  # of Bloom, which reads them in another mode only
        return set()
    try:
        return set(READ.findall(inspect.getsource(type(parent))))
    except (OSError, TypeError):  # no source: a class made by a program
        return set()


def _renames(model: PreTrainedModel, config: Any, leaf: str) -> bool:
    """Whether peft would put the experts' parameters in place of a layer of this name, here and in a reader's peft."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
        from peft.utils.transformers_weight_conversion import get_model_conversion_mapping
    except ImportError:  # before peft 0.19 there was no such conversion
        return False
    probe = copy.copy(config)
    probe.target_modules, probe.target_parameters, probe.rank_pattern, probe.alpha_pattern = {leaf}, None, {}, {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert(probe, model=model, conversions=get_model_conversion_mapping(model))
    except ValueError:  # one of two names that are fused
        return True
    return leaf not in probe.target_modules
