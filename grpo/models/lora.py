"""LoRA: a frozen model and small trained matrices beside its linear layers (arXiv 2106.09685), through peft.

    y = W x + (lora_alpha / r) B A x        W frozen, A [r, in], B [out, r] trained, B zero at the start

peft puts the matrices into the model's own modules. The trainer, the engine and the scorer use that model
(`plain(peft_model)`), which has its body, head and config like any other. Tensors are stored under peft's names, in
adapter_config.json and adapter_model.safetensors, which plain peft opens. Adapters are untrusted, as models are: only
plain LoRA on linear layers is read.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo.config.names import find_path, model_name
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.loading import load_plain, resolve
from grpo.models.lora_checks import is_adapter
from grpo.models.lora_files import (
    ACTIVE,
    REFERENCE,
    base_of,
    dtype_of_4bit,
    inner_name,
    outer_name,
    refuse_empty,
    settings_of,
    tensors_of,
)
from grpo.models.lora_targets import choose_targets, refuse_conversion
from grpo.models.quantization import dequantize, is_4bit, no_kernel_download

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports DeepSpeed, which reads it
with no_kernel_download():  # peft imports bitsandbytes, too
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer


def open_adapter(folder: Path | str, device: torch.device) -> PeftModelForCausalLM:
    """Load an adapter with its base model. Raises UserError.

    The base is loaded as in training: fp32, or 4 bits if the checkpoint was trained so.
    """
    folder = Path(folder)
    settings, name = settings_of(folder), base_of(folder)
    base = load_plain(name, device, four_bit=dtype_of_4bit(folder))
    return _with_adapter(base, name, settings, folder)


def merged(model: PeftModel) -> PreTrainedModel:
    """A plain model with the adapter added to its weights, W + (alpha / r) B A.

    4-bit weights are converted to fp32 first: rounding the sum to 4 bits again would give another model.
    """
    peft_model: Any = model
    if any(is_4bit(module) for module in model.modules()):
        config, tensors = model.peft_config[ACTIVE], adapter_tensors(plain(model))
        base = dequantize(peft_model.unload())
        peft_model = _wrap(base, str(config.base_model_name_or_path), _lora_settings(config.to_dict()))
        _copy(plain(peft_model), tensors)
    merged_model: PreTrainedModel = peft_model.merge_and_unload()
    return merged_model.requires_grad_(True)


def adapter_tensors(model: nn.Module, adapter: str = ACTIVE) -> dict[str, nn.Parameter]:
    """Parameter name -> matrix A or B of the adapter."""
    infixes = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    return {name: p for name, p in model.named_parameters() if any(infix in name for infix in infixes)}


def _copy(model: nn.Module, tensors: dict[str, Any], adapter: str = ACTIVE) -> None:
    for name, parameter in adapter_tensors(model, adapter).items():
        parameter.data.copy_(tensors[name])


def _lora_settings(settings: dict[str, Any]) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_rslora")
    return {name: settings[name] for name in names if name in settings}


def plain(model: PeftModel) -> PreTrainedModel:
    """The transformers model, with the adapter inside its modules."""
    return cast(PreTrainedModel, model.get_base_model())


def load_lora(cfg: Config, device: torch.device, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model of a LoRA run: frozen, with a new adapter or a checkpoint's. Raises UserError.

    If `model` is an adapter itself, training continues it, on its base. In bf16 arithmetic the frozen layers are
    stored in bf16: autocast would round them to the same bits in every product.
    """
    path = Path(resolve(model_name(cfg), weights=False))
    initial = Path(resolve(model_name(cfg))) if is_adapter(path) else None
    compute_dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    base = load_plain(
        base_of(initial) if initial else model_name(cfg), device, compute_dtype if cfg.load_in_4bit else None
    )
    stored = None if checkpoint is None else settings_of(checkpoint)["target_modules"]
    model = start_lora(base, cfg, initial, stored)
    if checkpoint is not None:
        fill(model, checkpoint)
    if cfg.dtype == "bf16" and cfg.backend != "deepspeed":  # DeepSpeed needs all weights in one dtype
        _frozen_to_bf16(model)
    return model.eval()  # new layers start in training mode, with dropout on


def _frozen_to_bf16(model: PreTrainedModel) -> None:
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not is_4bit(module) and id(module.weight) not in embeddings:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def start_lora(
    base: PreTrainedModel, cfg: Config, initial: Path | None = None, stored: str | list[str] | None = None
) -> PreTrainedModel:
    """Freeze the model and add a new adapter to its layers. Raises UserError.

    A is drawn from `seed` alone, the same on every rank; B is zero. initial: the folder of an adapter whose values the
    new one starts from; with beta > 0 a frozen copy of them stays in the model as the reference. stored: the target
    modules of the checkpoint that is continued, which stay the same; None: they are chosen (lora_targets.py).
    """
    settings: dict[str, Any] = {
        "r": cfg.lora_r,
        "lora_alpha": 2 * cfg.lora_r if cfg.lora_alpha is None else cfg.lora_alpha,
        "lora_dropout": cfg.lora_dropout,
        "target_modules": cfg.lora_target_modules,
    }
    name = base_of(initial) if initial is not None else model_name(cfg)
    if initial is not None and (scale := _scale(settings_of(initial))) != _scale(settings):
        raise UserError(
            f"lora_alpha: {initial} counts {scale:g} times, got {_scale(settings):g}. Use its own settings."
        )
    settings["target_modules"] = stored or choose_targets(base, cfg.lora_target_modules, LoraConfig(**settings))
    model = _wrap(base, name, settings)
    _draw(model, cfg.seed)
    if initial is not None:
        fill(plain(model), initial)
        if cfg.beta > 0:
            model.add_adapter(REFERENCE, model.peft_config[ACTIVE])
            model.set_adapter(ACTIVE)
            fill(plain(model), initial, REFERENCE)
    base = plain(model).requires_grad_(False)
    for parameter in adapter_tensors(base).values():
        parameter.requires_grad_(True)
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    for i, layer in enumerate(layers if cfg.lora_dropout else ()):
        layer.lora_dropout[ACTIVE] = KeyedDropout(cfg.lora_dropout, i)
    base.lora_config = model.peft_config[ACTIVE]  # type: ignore[assignment]
    return base


def _scale(settings: dict[str, Any]) -> float:
    return float(settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1))


def _wrap(base: PreTrainedModel, name: str, settings: dict[str, Any]) -> PeftModelForCausalLM:
    """Wrap the model in peft's, with a new adapter. Raises UserError when the target modules do not fit."""
    config = LoraConfig(task_type="CAUSAL_LM", bias="none", **settings)
    config.base_model_name_or_path, _, revision = (name, "", "") if find_path(name) else name.partition("@")
    config.revision = revision or None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that Conv1D layers are transposed, and handles it
        try:
            model = PeftModelForCausalLM(base, config, adapter_name=ACTIVE)
        except ValueError as error:
            raise UserError(
                f"lora_target_modules: {settings['target_modules']} do not fit the model: "
                f"{' '.join(str(error).split())[:200]} Use all-linear, or names of its linear layers."
            ) from None
    refuse_conversion(config, settings["target_modules"])
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(isinstance(module, LoraLayer) for module in embeddings):
        raise UserError(
            f"lora_target_modules: {settings['target_modules']} include the embeddings or the head. "
            "Use all-linear, or names of linear layers inside the blocks."
        )
    return model


def _with_adapter(base: PreTrainedModel, name: str, settings: dict[str, Any], folder: Path) -> PeftModelForCausalLM:
    """Add a stored adapter to its base. Raises UserError."""
    try:
        model = _wrap(base, name, _lora_settings(settings))
    except UserError as error:
        raise UserError(f"adapter: {folder} does not fit {name!r}: {error}") from None
    fill(plain(model), folder)
    refuse_empty(folder, tensors_of(folder))
    model.eval()
    return model


def _draw(model: PeftModel, seed: int) -> None:
    """Initialize A uniformly in +-1/sqrt(in), as peft does but from our seed, and B with zeros."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name, parameter in sorted(plain(model).named_parameters()):
        if f".lora_A.{ACTIVE}." in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
            parameter.data = values.to(parameter.device)
        elif f".lora_B.{ACTIVE}." in name:
            parameter.data = torch.zeros(parameter.shape, device=parameter.device)


def fill(model: PreTrainedModel, folder: Path, adapter: str = ACTIVE) -> None:
    """Copy a folder's tensors into the model's adapter of this name. Raises UserError when they do not fit."""
    stored = {inner_name(name, adapter): tensor for name, tensor in tensors_of(folder).items()}
    own = adapter_tensors(model, adapter)
    misfits = sorted(stored.keys() ^ own.keys()) or [n for n in own if own[n].shape != stored[n].shape]
    if misfits:
        first = misfits[0]
        got, expected = (list(tensors[first].shape) if first in tensors else "nothing" for tensors in (stored, own))
        raise UserError(
            f"adapter: {folder} does not fit the model: {len(misfits)} tensors, such as {outer_name(first)[:120]}: "
            f"expected {expected}, got {got}. Use the model it was trained on, and its own settings."
        )
    _copy(model, stored, adapter)


class KeyedDropout(nn.Module):
    """Dropout with masks drawn from a key: the same on any rank, in a recomputed forward, and after resuming."""

    needs_training_mode = True  # see forward/modes.py

    def __init__(self, share: float, index: int):
        super().__init__()
        self.share = share
        self.index = index  # of this layer
        self.key = (0, 0, 0)  # seed, update, first row of the micro-batch

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        seed = np.random.SeedSequence([*self.key, self.index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(inputs.device).manual_seed(int(seed >> 1))
        mask = torch.rand(inputs.shape, generator=generator, device=inputs.device) >= self.share
        return inputs * mask / (1 - self.share)


def key_dropout(model: nn.Module, seed: int, update: int, row: int) -> None:
    """Set the key of the next forward's masks. row: the first one of the micro-batch."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.key = (seed, update, row)


@contextmanager
def as_reference(model: PreTrainedModel) -> Iterator[None]:
    """The reference model: with the adapter switched off, or replaced by the one that training started from.

    Set on the layers themselves: peft's own switch also toggles requires_grad, which ZeRO does not support.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            if REFERENCE in layer.lora_A:
                layer._active_adapter = [REFERENCE]
            else:
                layer._disable_adapters = True
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
