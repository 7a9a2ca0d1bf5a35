"""Opening a model's folder or hub name: looked at first, then read by transformers, then made ready for training.

Folders and hub repositories are untrusted: safetensors only, no code of theirs is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.settings import find_path
from grpo.errors import UserError
from grpo.forward.shared_attention import use_trees
from grpo.models.folder_checks import model_problem, weights_problem
from grpo.models.hub import fetch_model
from grpo.models.lora_checks import adapter_problem, is_adapter

CACHE_LINE = 64  # bytes; where torch's own allocations begin


def resolve(name: str, weights: bool = True) -> str:
    """A model's folder: a local one, or where a hub name was fetched to. Raises UserError for one that is no model.

    weights: False fetches none, where settings or a tokenizer are enough.
    """
    path = find_path(name)
    if path is None:
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"model: no such folder {name!r}. Give a model folder, or a hub name like Qwen/Qwen2.5-0.5B."
            )
        path = fetch_model(name, weights)
    if not is_adapter(path) and not (path / "config.json").exists():
        raise UserError(f"model: {name!r} holds no config.json. Give a folder written by save_pretrained.")
    problem = adapter_problem(path) if is_adapter(path) else model_problem(path)
    if problem is not None:
        raise UserError(f"model: {name!r} is not opened: {problem}. Use another model, or fetch it again.")
    return str(path)


@contextmanager
def _border(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises on a strange folder into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise a dozen kinds
        raise UserError(f"model: {what}: {_first_line(error)} {advice}".strip()) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how tokenizers' Rust fails; it is no Exception
            raise
        raise UserError(f"model: {what}: {_first_line(error)} {advice}".strip()) from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name. Raises UserError."""
    with _border(f"no tokenizer could be loaded from {name!r}", ""):
        return AutoTokenizer.from_pretrained(resolve(name, weights=False), trust_remote_code=False)


def load_plain(name: str, device: torch.device, four_bit: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model in fp32 with dropout off. Raises UserError.

    Dropout is off for good, so that sampling, scoring and training compute one and the same function. Weights that
    the files lack are refused: transformers would draw them at random. four_bit: hold the linear layers in 4 bits,
    frozen, and multiply in this type.
    """
    folder = resolve(name)
    if Path(folder).is_dir():
        problem = weights_problem(Path(folder))
        if problem is not None:
            raise UserError(f"model: {name!r} could not be loaded: {problem}. Give a folder with safetensors weights.")
    with _border(
        f"{name!r} could not be loaded", "Give a folder with safetensors weights, or a hub name that can be reached."
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    model, found = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if found.get(kind):
            raise UserError(
                f"model: {name!r} could not be loaded: {len(found[kind])} weights do not fit its config.json, "
                f"such as {sorted(map(str, found[kind]))[0][:100]}. Give a complete model folder."
            )
    _align(model)
    prepare(model)
    if four_bit is not None:
        from grpo.models.quantization import quantize

        quantize(model, four_bit)
    return model.to(device)


def _align(model: PreTrainedModel) -> None:
    """Move weights that begin off a cache line: matrix products may round differently there.

    A file's weights lie where the file has them; resumed and uninterrupted runs are to compute the same bits.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % CACHE_LINE:
            parameter.data = parameter.data.clone()


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off dropout, and the attention kernels that would ignore the model's soft cap."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  a float, whatever nn.Module's annotations say
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    use_trees(model)
    return model.eval()


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
