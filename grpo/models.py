"""Loading models and tokenizers; what the rest needs to know about them.

Folders and hub repositories are untrusted: safetensors only, no code of theirs is run.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.attention import use_trees
from grpo.config import find_path
from grpo.errors import UserError
from grpo.hub import fetch_model
from grpo.untrusted import model_problem, weights_problem
from grpo.untrusted_adapters import adapter_problem, is_adapter

CACHE_LINE = 64  # bytes; where torch's own allocations begin


def quiet() -> None:
    """No loading bars, no library chatter: what a run says, it says itself."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it guessed so
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs errors that it also raises


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


def load_model(name: str, device: torch.device, four_bit: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model in fp32 with dropout off. Raises UserError.

    Dropout is off for good, so that sampling, scoring and training compute one and the same function. Weights that
    the files lack are refused: transformers would draw them at random. An adapter's folder gives its model with the
    adapter added to the weights. four_bit: hold the linear layers in 4 bits, frozen, and multiply in this type.
    """
    folder = resolve(name)
    if is_adapter(Path(folder)):
        from grpo.adapters import merged, open_adapter  # late: peft takes seconds

        return merged(open_adapter(folder, device))
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
        from grpo.quantization import quantize

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


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end a completion: the generation config's, the model config's and the tokenizer's.

    Raises UserError for an id that is no token of the model.
    """
    limit = vocabulary_size(model)
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        for here in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if type(here) is not int or not 0 <= here < limit:
                raise UserError(
                    f"model: eos_token_id must be tokens of the model, 0 to {limit - 1}, got {str(here)[:60]!r}. "
                    "Mend generation_config.json, config.json or the tokenizer."
                )
            ids.add(here)
    return frozenset(ids)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that the model has embeddings for, also where its weights are sharded."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for. Raises UserError."""
    limit = vocabulary_size(model)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if not 0 <= i < limit}
    if beyond:
        token = min(beyond, key=lambda token: beyond[token])
        raise UserError(
            f"model: its tokenizer has {len(beyond)} tokens beyond the model's {limit}, such as {token[:40]!r} with id "
            f"{beyond[token]}. Use the model's own tokenizer, or resize the model's embeddings."
        )


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


def is_lora(model: nn.Module) -> bool:
    """Whether a model is frozen and trained through an adapter inside it (grpo/adapters.py)."""
    return hasattr(model, "lora_config")


def arithmetic(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass: plain fp32, or bf16 products over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bf16" else nullcontext()


def arithmetic_dtype(dtype: str) -> torch.dtype:
    """What `arithmetic` computes products in."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
