"""Exports that are folders: merged_16bit and merged_4bit, which transformers opens, and lora, which peft opens."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo.checkpoints.background import serialized_tokenizer
from grpo.checkpoints.manifest import write_manifest
from grpo.data.recipe import recipe_text
from grpo.errors import UserError
from grpo.export.source import Source
from grpo.models.lora_checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo.models.quantization import library

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def check_merged_4bit() -> None:
    """Refuse where bitsandbytes is missing. Raises UserError."""
    library("to merged_4bit")


def check_lora(source: Source) -> None:
    """Refuse a checkpoint that is not an adapter, and an adapter whose product B A is zero. Raises UserError."""
    if not source.is_adapter:
        raise UserError(
            f"to: lora needs an adapter, and {source.folder} holds whole weights. Use --to merged_16bit, or train "
            "an adapter."
        )
    from grpo.models.lora_files import refuse_empty

    refuse_empty(source.folder, load_file(source.folder / ADAPTER_WEIGHTS))


def complete(source: Source, folder: Path) -> None:
    """Add what every folder has beside its weights: tokenizer, chat template, recipe, settings, manifest."""
    for name, content in serialized_tokenizer(source.tokenizer).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    add_recipe(source, folder)
    (folder / "trainer" / "state.json").write_text(json.dumps(source.state, indent=2) + "\n", encoding="utf-8")
    write_manifest(folder, source.step)


def add_recipe(source: Source, folder: Path) -> None:
    """Add the prompt recipe."""
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    (folder / "trainer" / "recipe.json").write_text(recipe_text(source.recipe), encoding="utf-8")


def write_merged_16bit(source: Source, folder: Path, dtype: str) -> str:
    """The whole model in 16 bits. bf16 has fp32's range, so nothing overflows; f16 has three more bits.

    Returns a line about it. Raises UserError where f16 cannot hold a weight.
    """
    model = _in_16_bits(source, dtype)
    for name, tensor in model.state_dict().items():
        if dtype == "f16" and not bool(tensor.isfinite().all()):
            raise UserError(f"dtype: {name} has values beyond f16's 65504. Use --dtype bf16.")
    model.save_pretrained(folder)
    complete(source, folder)
    return dtype


def _in_16_bits(source: Source, dtype: str) -> PreTrainedModel:
    model = source.model()
    nn.Module.to(model, DTYPES[dtype])  # PreTrainedModel.to is this, under a decorator that hides its types
    return model


def write_merged_4bit(source: Source, folder: Path) -> str:
    """The whole model with its matrices in nf4, embeddings and head in bf16. Returns a line about it."""
    whole = folder / "whole"
    _in_16_bits(source, "bf16").save_pretrained(whole)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=how, dtype=torch.bfloat16, device_map={"": device}, use_safetensors=True
    )
    shutil.rmtree(whole)
    model.save_pretrained(folder)
    complete(source, folder)
    return "nf4"


def write_lora(source: Source, folder: Path) -> str:
    """The adapter alone, for the base that it was trained on. Returns a line about it."""
    from grpo.models.lora_files import refuse_empty

    folder.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source.folder / name, folder / name)
    refuse_empty(folder, load_file(folder / ADAPTER_WEIGHTS))
    complete(source, folder)
    return "LoRA weights saved and verified."
