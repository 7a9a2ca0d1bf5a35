"""LoRA: a frozen model and small trained matrices beside its linear layers (arXiv 2106.09685), through peft.

    y = W x + (lora_alpha / r) B A x        W frozen, A [r, in], B [out, r] trained, B zero at the start

peft puts the matrices into the model's own modules. What the trainer, the engine and the scorer hold is that
model (`plain(peft_model)`), so that its body, head and config are found as in any other. Tensors are stored under
peft's names, as adapter_config.json and adapter_model.safetensors, which plain peft opens. Nothing but plain
LoRA on linear layers is read: adapters come from strangers as models do.
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

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models.loading import load_plain, resolve
from grpo.models.lora_checks import is_adapter
from grpo.models.lora_files import (
    ACTIVE,
    REFERENCE,
    base_of,
    held_in_4bit,
    inner_name,
    outer_name,
    refuse_empty,
    settings_of,
    tensors_of,
)
from grpo.models.quantization import is_4bit, nothing_fetched, unpack

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports DeepSpeed where it is installed, which asks
with nothing_fetched():  # and bitsandbytes
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer

__all__ = ["is_adapter", "merged", "open_adapter"]


def open_adapter(folder: Path | str, device: torch.device) -> PeftModelForCausalLM:
    """An adapter on its model, ready to be used. Raises UserError.

    The model is held as in training: fp32, or in 4 bits where the checkpoint says so.
    """
    folder = Path(folder)
    settings, name = settings_of(folder), base_of(folder)
    base = load_plain(name, device, four_bit=held_in_4bit(folder))
    return _with_adapter(base, name, settings, folder)


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with the adapter added to its weights, W + (alpha / r) B A, and no trace of LoRA or of 4 bits.

    Weights in 4 bits are first written out as what they stand for: rounded again, the sum would be another model.
    """
    inside: Any = model
    if any(is_4bit(module) for module in model.modules()):
        config, kept = model.peft_config[ACTIVE], adapter_tensors(plain(model))
        base = unpack(inside.unload())
        inside = _wrap(base, str(config.base_model_name_or_path), _known(config.to_dict()))
        _copy(plain(inside), kept)
    without: PreTrainedModel = inside.merge_and_unload()
    return without.requires_grad_(True)


def adapter_tensors(model: nn.Module, adapter: str = ACTIVE) -> dict[str, nn.Parameter]:
    """The adapter's matrices by their parameters' names."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    return {name: p for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def _copy(model: nn.Module, tensors: dict[str, Any], adapter: str = ACTIVE) -> None:
    for name, parameter in adapter_tensors(model, adapter).items():
        parameter.data.copy_(tensors[name])


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    known = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_rslora")
    return {key: settings[key] for key in known if key in settings}


def plain(model: PeftModel) -> PreTrainedModel:
    """The model itself, with the adapter inside its modules."""
    return cast(PreTrainedModel, model.get_base_model())


def load_lora(cfg: Config, device: torch.device, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model of a LoRA run: frozen, with a new adapter, or a checkpoint's. Raises UserError.

    Where `model` is an adapter itself, training goes on from it, on its model. Under bf16 arithmetic the frozen
    layers are held in bf16: autocast would round them so in every product, to the same bits.
    """
    assert cfg.model is not None
    path = Path(resolve(cfg.model, weights=False))
    begin = Path(resolve(cfg.model)) if is_adapter(path) else None
    compute = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    base = load_plain(base_of(begin) if begin else cfg.model, device, compute if cfg.load_in_4bit else None)
    model = start_lora(base, cfg, begin)
    if checkpoint is not None:
        fill(model, checkpoint)
    if cfg.dtype == "bf16" and cfg.backend != "deepspeed":  # which wants all of a model in one type
        _hold_in_bf16(model)
    return model.eval()  # new layers begin in training mode, with dropout on


def _hold_in_bf16(model: PreTrainedModel) -> None:
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not is_4bit(module) and id(module.weight) not in ends:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def start_lora(base: PreTrainedModel, cfg: Config, begin: Path | None = None) -> PreTrainedModel:
    """Freeze the model and put a new adapter beside its layers. Raises UserError.

    A is drawn from `seed` alone, the same on every rank; B is zero. begin: start from this adapter's numbers,
    which stay beside it, frozen, as the reference where beta asks for one.
    """
    settings = {
        "r": cfg.lora_r,
        "lora_alpha": 2 * cfg.lora_r if cfg.lora_alpha is None else cfg.lora_alpha,
        "lora_dropout": cfg.lora_dropout,
        "target_modules": cfg.lora_target_modules,
    }
    name = base_of(begin) if begin is not None else str(cfg.model)
    if begin is not None and (scale := _scale(settings_of(begin))) != _scale(settings):
        raise UserError(f"lora_alpha: {begin} counts {scale:g} times, got {_scale(settings):g}. Use its own settings.")
    model = _wrap(base, name, settings)
    _draw(model, cfg.seed)
    if begin is not None:
        fill(plain(model), begin)
        if cfg.beta > 0:
            model.add_adapter(REFERENCE, model.peft_config[ACTIVE])
            model.set_adapter(ACTIVE)
            fill(plain(model), begin, REFERENCE)
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
    """peft's model around ours. Raises UserError when the target modules do not fit."""
    config = LoraConfig(task_type="CAUSAL_LM", bias="none", **settings)
    config.base_model_name_or_path = name
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D layers are transposed: peft says so, and acts on it
        try:
            model = PeftModelForCausalLM(base, config, adapter_name=ACTIVE)
        except ValueError as error:
            raise UserError(
                f"lora_target_modules: {settings['target_modules']} do not fit the model: "
                f"{' '.join(str(error).split())[:200]} Use all-linear, or names of its linear layers."
            ) from None
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(isinstance(module, LoraLayer) for module in ends):
        raise UserError(
            f"lora_target_modules: {settings['target_modules']} include the embeddings or the head. "
            "Use all-linear, or names of linear layers inside the blocks."
        )
    return model


def _with_adapter(base: PreTrainedModel, name: str, settings: dict[str, Any], folder: Path) -> PeftModelForCausalLM:
    """A stored adapter on its model. Raises UserError."""
    try:
        model = _wrap(base, name, _known(settings))
    except UserError as error:
        raise UserError(f"adapter: {folder} does not fit {name!r}: {error}") from None
    fill(plain(model), folder)
    refuse_empty(folder, tensors_of(folder))
    model.eval()
    return model


def _draw(model: PeftModel, seed: int) -> None:
    """Uniform in +-1/sqrt(in), as peft draws A, but from a seed of our own."""
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
    odd = sorted(stored.keys() ^ own.keys()) or [n for n in own if own[n].shape != stored[n].shape]
    if odd:
        there, wanted = (list(s[odd[0]].shape) if odd[0] in s else "nothing" for s in (stored, own))
        raise UserError(
            f"adapter: {folder} does not fit the model: {len(odd)} tensors, such as {outer_name(odd[0])[:120]}: "
            f"{there} there, {wanted} wanted. Use the model it was trained on, and its own settings."
        )
    _copy(model, stored, adapter)


class KeyedDropout(nn.Module):
    """Dropout whose masks follow from a key: the same on any rank, in a recomputed forward, and after resuming."""

    def __init__(self, share: float, index: int):
        super().__init__()
        self.share = share
        self.index = index  # of this layer
        self.key = (0, 0, 0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Leave out a share of the inputs while training, scale the rest up."""
        if not self.training:
            return inputs
        seed = np.random.SeedSequence([*self.key, self.index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(inputs.device).manual_seed(int(seed >> 1))
        kept = torch.rand(inputs.shape, generator=generator, device=inputs.device) >= self.share
        return inputs * kept / (1 - self.share)


def key_dropout(model: nn.Module, seed: int, update: int, sample: int) -> None:
    """Choose the masks of the next forward: by seed, update and the micro-batch's first row."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.key = (seed, update, sample)


@contextmanager
def as_reference(model: PreTrainedModel) -> Iterator[None]:
    """The model as training met it: the adapter off, or in its place the one that training began with.

    Set on the layers themselves: peft's own switch also turns gradients off and on, which ZeRO must not meet.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            if REFERENCE in layer.lora_A:
                layer._active_adapter = [REFERENCE]
            else:
                layer._disable_adapters = True
        yield
    finally:
        for layer, (disabled, active) in zip(layers, kept, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
