"""Loading models and tokenizers; what the rest needs to know about them.

Folders and hub repositories are untrusted: safetensors only, no code of theirs is run.
"""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import find_path
from grpo.errors import UserError


def quiet() -> None:
    """No loading bars, no library chatter: what a run says, it says itself."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def resolve(name: str) -> str:
    """A local folder's path, or the hub name unchanged. Raises UserError for a folder that is no model."""
    path = find_path(name)
    if path is None:
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"model: no such folder {name!r}. Give a model folder, or a hub name like Qwen/Qwen2.5-0.5B."
            )
        return name
    if not (path / "config.json").is_file():
        raise UserError(f"model: {name!r} holds no config.json. Give a folder written by save_pretrained.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model: {name}/config.json is not JSON ({error}). Fetch the model again.") from None
    if "auto_map" in config:
        raise UserError(
            f"model: {name!r} wants to run code of its own (auto_map), which is never done. Use another model."
        )
    return str(path)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: no tokenizer could be loaded from {name!r}: {_first_line(error)}") from None


def load_model(name: str, device: torch.device) -> PreTrainedModel:
    """Load a causal language model in fp32 with dropout off. Raises UserError.

    Dropout is off for good, so that sampling, scoring and training compute one and the same function.
    """
    folder = resolve(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model: {name!r} could not be loaded: {_first_line(error)} "
            "Give a folder with safetensors weights, or a hub name that can be reached."
        ) from None
    prepare(model)
    return model.to(device)  # type: ignore[arg-type]


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off dropout, and the attention kernels that would ignore the model's soft cap."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  a float, whatever nn.Module's annotations say
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    return model.eval()


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end a completion: the generation config's, the model config's and the tokenizer's."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, Iterable) else [] if value is None else [value])
    return frozenset(int(i) for i in ids)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model has positions for; None if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_lengths(model: PreTrainedModel, max_prompt_length: int, max_generate_length: int) -> None:
    """Refuse lengths that the model has no positions for. Raises UserError."""
    limit = max_positions(model)
    if limit is not None and max_prompt_length + max_generate_length > limit:
        raise UserError(
            f"max_prompt_length + max_generate_length: must be at most the model's {limit} positions, "
            f"got {max_prompt_length} + {max_generate_length}. Lower one."
        )


def arithmetic(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass: plain fp32, or bf16 products over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bf16" else nullcontext()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
