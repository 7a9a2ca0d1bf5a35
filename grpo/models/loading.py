"""Loading a model's folder or hub name: checks first, then transformers, then preparation for training.

Folders and hub repositories are untrusted: only safetensors are read, and none of their code is run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.names import find_path
from grpo.errors import UserError, first_line
from grpo.forward.precision import disable_cudnn_attention
from grpo.forward.shared_attention import use_shared_attention
from grpo.models.classes import check_class
from grpo.models.folder_checks import model_problem, weights_problem
from grpo.models.gguf_weights import find_gguf, open_gguf
from grpo.models.hub import fetch_model
from grpo.models.lora_checks import adapter_problem, is_adapter
from grpo.models.trial import check_model

RANDOM = re.compile("drop")  # names of probabilities: attention_dropout, layerdrop, drop_path
CACHE_LINE = 64  # bytes; torch aligns its own allocations to it


def resolve(name: str, weights: bool = True) -> str:
    """A model's folder: the local one, or that of a fetched hub name or GGUF file. Raises UserError when it is none.

    weights: False fetches no weights, when settings or a tokenizer are enough.
    """
    path = find_path(name)
    if path is None:
        if name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") != 1:
            raise UserError(
                f"model: no such folder {name!r}. Give a model folder, a .gguf file, or a hub "
                "name like Qwen/Qwen2.5-0.5B."
            )
        path = fetch_model(name, weights)
    file = find_gguf(path)
    if file is not None:
        path = open_gguf(file)
    if not is_adapter(path) and not (path / "config.json").exists():
        raise UserError(f"model: {name!r} holds no config.json. Give a folder written by save_pretrained.")
    problem = adapter_problem(path) if is_adapter(path) else model_problem(path)
    if problem is not None:
        raise UserError(f"model: {name!r} is not opened: {problem}. Use another model, or fetch it again.")
    return str(path)


@contextmanager
def _library_errors(what: str, advice: str) -> Iterator[None]:
    """Turn any exception that a library raises for a bad folder into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # transformers, tokenizers and safetensors raise a dozen classes
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers' Rust code
            raise
        raise UserError(f"model: {what}: {first_line(error)[:300]} {advice}".strip()) from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name. Raises UserError."""
    with _library_errors(f"no tokenizer could be loaded from {name!r}", ""):
        return AutoTokenizer.from_pretrained(resolve(name, weights=False), trust_remote_code=False)


def load_plain(name: str, device: torch.device, four_bit: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model in fp32 with dropout off. Raises UserError.

    Dropout stays off, so that sampling, scoring and training compute the same function. A missing weight is an error:
    transformers would initialize it at random. four_bit: hold the linear layers in 4 bits, frozen, and compute their
    products in this dtype.
    """
    folder = resolve(name)
    with _library_errors(f"the settings of {name!r} could not be loaded", "Mend its config.json."):
        check_class(name, Path(folder))
    if Path(folder).is_dir():
        problem = weights_problem(Path(folder))
        if problem is not None:
            raise UserError(f"model: {name!r} could not be loaded: {problem}. Give a folder with safetensors weights.")
    with _library_errors(
        f"{name!r} could not be loaded", "Give a folder with safetensors weights, or a hub name that can be reached."
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise UserError(
                f"model: {name!r} could not be loaded: {len(report[kind])} weights do not fit its config.json, "
                f"such as {sorted(map(str, report[kind]))[0][:100]}. Give a complete model folder."
            )
    _align(model)
    prepare(model)
    if four_bit is not None:
        from grpo.models.quantization import quantize

        quantize(model, four_bit)
    model.to(device)
    check_model(model, name, exact=four_bit is None)
    return model


def _align(model: PreTrainedModel) -> None:
    """Copy weights whose memory is not aligned to cache lines: matrix products may round differently there.

    Weights read from a file keep the file's alignment, and resumed and uninterrupted runs must compute the same bits.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % CACHE_LINE:
            parameter.data = parameter.data.clone()


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off dropout, and attention kernels that ignore the model's soft cap; use shared attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and RANDOM.search(name):  # many forwards read such an attribute themselves
                setattr(module, name, 0.0)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
    disable_cudnn_attention()
    use_shared_attention(model)
    return model.eval()
