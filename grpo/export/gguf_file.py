"""GGUF files: f16 and q8_0 are written here, K-quants by llama.cpp's quantiser; llama.cpp checks the tokenizer.

llama-cpp-python is an optional extra, because it compiles for minutes. Without it f16 and q8_0 are written, but their
tokenizer is not checked; K-quants are refused.
"""

import ctypes
import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import UserError
from grpo.export.gguf_model import ARCHITECTURES, add_settings, encoded, kind_for, tensors
from grpo.export.gguf_tokenizer import PROBES, add_tokenizer
from grpo.models.checks import stop_token_ids

WRITTEN_HERE = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
BY_LLAMA_CPP = {"q5_k_m": LlamaFileType.MOSTLY_Q5_K_M, "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M}
QUANTS = (*WRITTEN_HERE, *BY_LLAMA_CPP)
EXTRA = "pip install 'grpo-torchrun[gguf]' (compiles for minutes)"


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_quants(quants: Iterable[str]) -> None:
    """Refuse K-quants where llama-cpp-python is missing. Raises UserError."""
    for quant in quants:
        if quant in BY_LLAMA_CPP and not has_llama_cpp():
            raise UserError(
                f"quant: {quant} is made by llama-cpp-python, which is not installed. {EXTRA}, or use --quant f16,q8_0."
            )


def write_gguf(
    path: Path,
    quant: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    end_of_turn: str | None = None,
) -> None:
    """Write one file, f16 or q8_0, a tensor at a time. end_of_turn: the recipe's. Raises UserError and OSError."""
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    writer.add_name(name)
    writer.add_file_type(WRITTEN_HERE[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, model.config)
    stop_ids = stop_token_ids(model, tokenizer, end_of_turn)
    add_tokenizer(writer, tokenizer, model.config.vocab_size, stop_ids)
    for own, values in tensors(model):
        kind = kind_for(quant, values.shape)
        block, in_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(own, values.shape, values.dtype, values.size // block * in_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, values in tensors(model):
            writer.write_tensor_data(encoded(own, values, kind_for(quant, values.shape)))
    finally:
        writer.close()


@contextmanager
def llama_cpp_log() -> Iterator[list[str]]:
    """Collect llama.cpp's log, which otherwise goes to stderr."""
    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def quantize(source: Path, path: Path, quant: str) -> None:
    """Have llama.cpp quantise an f16 file. Raises UserError with the last line of llama.cpp's log when it fails."""
    import llama_cpp

    with llama_cpp_log() as lines:
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype = int(BY_LLAMA_CPP[quant])
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(how))
    if failed or not path.is_file():
        last = next((line for line in reversed(lines) if len(line) > 1), "no reason given")
        raise UserError(f"quant: llama.cpp could not write {quant}: {last[:200]}. Use --quant f16,q8_0.")


def contents(path: Path) -> dict[str, int]:
    """The number of matrices of each tensor type in a file."""
    kinds = Counter(t.tensor_type.name.lower() for t in GGUFReader(path).tensors if len(t.shape) > 1)
    return dict(sorted(kinds.items()))


def tokenizer_problem(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> str | None:
    """The first difference between llama.cpp and the tokenizer: probes, `texts`, stop tokens, size; None without."""
    import llama_cpp

    special = [added.content for added in tokenizer.added_tokens_decoder.values()]
    with llama_cpp_log():
        opened = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in (*PROBES, *texts, "a".join(["", *special[:50]])):
            text = unicodedata.normalize("NFC", text)
            theirs = opened.tokenize(text.encode(), add_bos=True, special=True)
            ours = tokenizer(text)["input_ids"]
            if theirs != ours:
                return f"{text[:40]!r} is {theirs[:12]} to llama.cpp, {ours[:12]} to us"
        vocab = llama_cpp.llama_model_get_vocab(opened.model)
        for i in stop_token_ids(model, tokenizer):
            if not llama_cpp.llama_vocab_is_eog(vocab, i):
                return f"token {i} ends an answer, and not to llama.cpp"
        count = llama_cpp.llama_vocab_n_tokens(vocab)
    size = model.config.vocab_size
    return None if count == size else f"llama.cpp sees {count} tokens, the model has {size}"
