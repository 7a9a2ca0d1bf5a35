"""`model: file.gguf`: a GGUF file becomes a model folder, once, in a cache; everything else opens that folder.

transformers dequantises the weights and makes the tokenizer. It ignores what it does not know, so the result is
compared with the file: the number of weights, each setting that changes the computation, and the way text is split.
"""

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from tokenizers import Regex, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from grpo.config.settings import PROJECT
from grpo.errors import EXIT_USER, UserError, first_line, warn
from grpo.models.gguf_header import GgufHeader, is_gguf, read_header
from grpo.strict_json import read_object

RULES = 2  # part of the cache's key: raised when the same file becomes another folder
RECORD = "opened_from_gguf.json"
COMPARED_WITH_LLAMA_CPP = ("gemma3", "llama", "qwen2", "qwen3")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name -> (steps of splitting text, whether a word that is a token is used without merging)
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": (("bytes and words",), False),
    "smollm": (("digits", "bytes and words"), False),
    "qwen2": ((WORDS % r"\p{N}", "bytes"), False),
    "smaug-bpe": ((WORDS % r"\p{N}{1,3}", "bytes"), False),
    "llama-bpe": ((WORDS % r"\p{N}{1,3}", "bytes"), True),
}
ADDS_BOS = ("llama-bpe",)  # byte-level kinds whose default it is; a file may say otherwise
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXTS = (8192, 4096, 16384, 32768)  # tokens before scaling; released models have the first


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder without config.json holds; None when it is a model folder.

    Raises UserError for a file of another kind, and for a folder with several.
    """
    if path.is_file():
        if path.suffix == ".gguf" or is_gguf(path):
            return path
        raise UserError(f"model: {str(path)!r} is a file and not GGUF. Give a model folder, or a .gguf file.")
    found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"model: {str(path)!r} holds {len(found)} GGUF files. Name one, such as {str(found[0])!r}.")
    return found[0] if found else None


def open_gguf(path: Path) -> Path:
    """The folder of a GGUF file's model: fp32 safetensors, tokenizer, chat template. Raises UserError.

    Ranks of one machine wait for the first, which converts; the folder appears whole or not at all.
    """
    status = path.stat()
    return _open(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.cache
def _open(path: Path, size: int, changed: int) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model: {path.name} is a GGUF file, and gguf is not installed. pip install 'gguf>=0.19'")
    try:
        header = read_header(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
        root = cached_assets_path("grpo-torchrun", "gguf")
        root.mkdir(parents=True, exist_ok=True)
        folder = root / f"{path.stem[:80]}-{digest.hexdigest()[:16]}-{RULES}"
        with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with this process and the one that converts, however they end
            if not (folder / RECORD).exists():
                _check_space(path, header, folder)
                _convert_apart(path, folder, lock.fileno())
    except (OSError, ValueError) as error:
        raise UserError(f"model: {str(path)!r} is not opened: {first_line(error)[:300]}. Use another file.") from None
    if os.environ.get("RANK", "0") == "0":
        warn(f"note: model: {path.name}: {read_object(folder / RECORD)['note']} ({folder})")
    return folder


def _check_space(path: Path, header: GgufHeader, folder: Path) -> None:
    in_bytes = 4 * header.num_weights
    free = shutil.disk_usage(folder.parent).free
    if free < 1.1 * in_bytes:
        raise ValueError(
            f"its fp32 copy takes {in_bytes / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left "
            "(HF_ASSETS_CACHE or HF_HOME moves it)"
        )
    warn(f"note: model: {path.name} is dequantised to fp32, once: {in_bytes / 1e9:.1f} GB in {folder}")


def _convert_apart(path: Path, folder: Path, lock: int) -> None:
    """Convert in a process of its own: its memory is free afterwards, and it is no rank. Raises ValueError.

    On ranks other than 0 save_pretrained writes nothing.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path), str(folder)],
        cwd=PROJECT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
        pass_fds=(lock,),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stdout if done.returncode == EXIT_USER else "its conversion failed: " + done.stderr
        raise ValueError((said.strip() or "it gave no reason").splitlines()[-1])


def _convert(path: Path, folder: Path) -> None:
    """Write the folder. Raises OSError, ValueError."""
    header = read_header(path)
    _check_whole(path, header)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _complete(config, path, header)
        _compare(config, header)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # transformers and gguf raise a dozen classes for files that they do not know
        raise ValueError(f"transformers cannot read it ({first_line(error)[:200]})") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != header.num_weights:
        raise ValueError(f"it holds {header.num_weights} weights, and transformers' {type(model).__name__} has {count}")
    model.hf_quantizer, model.is_quantized = None, False  # else save_pretrained refuses
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    words = _mend_tokenizer(tokenizer, header)
    model.save_pretrained(partial)
    _save_tokenizer(tokenizer, partial)
    (partial / RECORD).write_text(json.dumps({"file": path.name, "note": _note(header, words)}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _check_whole(path: Path, header: GgufHeader) -> None:
    parts = header.settings.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ValueError(f"it is one of {parts} parts. Join them with llama.cpp's `llama-gguf-split --merge` first")
    if "tokenizer.ggml.tokens" not in header.settings:
        raise ValueError("it holds no tokenizer")
    if header.settings.get("general.type", "model") != "model":
        raise ValueError(f"it holds a {str(header.settings['general.type'])[:40]} and no model")


def _compare(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Compare settings that change the computation with those that transformers took. Raises ValueError."""
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    taken = {
        "block_count": getattr(config, "num_hidden_layers", None),
        "embedding_length": getattr(config, "hidden_size", None),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": getattr(config, "v_head_dim", None) or head_dim,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": head_dim and int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "expert_count": getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
    }
    for name, used in taken.items():
        stated = header.settings.get(f"{header.architecture}.{name}")
        if stated is None or not isinstance(stated, (int, float, str)):
            continue
        if stated != used and not (
            isinstance(stated, float) and isinstance(used, (int, float)) and abs(stated - used) < 1e-5 * abs(stated)
        ):
            raise ValueError(
                f"it says {header.architecture}.{name} = {str(stated)[:40]}, which transformers does not carry over "
                f"(it takes {used})"
            )


def _complete(config: PreTrainedConfig, path: Path, header: GgufHeader) -> None:
    """Add what transformers does not read: the width of heads, Llama 3's rotary frequencies. Raises ValueError."""
    width = header.settings.get(f"{header.architecture}.attention.key_length")
    if isinstance(width, int) and hasattr(config, "head_dim"):
        config.head_dim = width
    if "rope_freqs.weight" not in header.tensors:
        return
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    [stored] = [tensor for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight"]
    factors = torch.tensor(stored.data.copy(), dtype=torch.float64).flatten()
    plain = dict(config.rope_parameters)
    theta = float(plain["rope_theta"])
    frequencies = theta ** (-torch.arange(0, 2 * len(factors), 2, dtype=torch.float64) / (2 * len(factors)))
    for original in LLAMA3_CONTEXTS:
        config.rope_parameters = {
            **plain,
            **LLAMA3_ROPE,
            "factor": float(factors.max()),
            "original_max_position_embeddings": original,
        }
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if torch.allclose(scaled.double() * factors, frequencies, rtol=1e-4, atol=0):
            return
    raise ValueError("its rotary frequencies are scaled in a way that is not Llama 3's")


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> str | None:
    """Split text, and add a BOS, as the file says. Returns what remains unknown, None when nothing does."""
    settings = header.settings
    backend: Any = tokenizer.backend_tokenizer
    unknown = None
    if settings.get("tokenizer.ggml.model") == "gpt2":
        kind = settings.get("tokenizer.ggml.pre", "gpt-2")
        if kind in SPLITS:
            steps, whole_words = SPLITS[kind]
            backend.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
            backend.model.ignore_merges = whole_words
        else:
            unknown = f"text is split by rules named {str(kind)[:40]!r}, which were not compared"
        adds_bos = kind in ADDS_BOS
    else:
        adds_bos = settings.get("tokenizer.ggml.model") == "llama"
    adds_bos = bool(settings.get("tokenizer.ggml.add_bos_token", adds_bos))
    adds_eos = bool(settings.get("tokenizer.ggml.add_eos_token", False))
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    front = [tokenizer.bos_token_id] if adds_bos else []
    back = [tokenizer.eos_token_id] if adds_eos else []
    if tokenizer("a")["input_ids"] != front + ids + back:
        named = [(text, tokenizer.convert_tokens_to_ids(text)) for text in {bos, eos} if text is not None]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos] * adds_bos + ["$A"] + [eos] * adds_eos, special_tokens=named
        )
    return unknown


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it under the class that reads tokenizer.json as it stands: others make their own rules of splitting text.

    Raises ValueError when the folder does not give the same tokenizer again.
    """
    kept = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    whole: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **kept)
    whole.chat_template = tokenizer.chat_template
    whole.padding_side = tokenizer.padding_side
    whole.save_pretrained(folder)
    saved, again = (
        json.loads(one.backend_tokenizer.to_str()) for one in (whole, AutoTokenizer.from_pretrained(folder))
    )
    if saved["normalizer"] is None and again["normalizer"] == {"type": "NFC"}:
        again["normalizer"] = None  # Qwen's; files do not name it, and nearly all text is in that form
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        if saved[part] != again[part]:
            raise ValueError(f"its tokenizer cannot be kept: transformers opens it with another {part}")


def _step(name: str) -> pre_tokenizers.PreTokenizer:
    """One step of splitting text, by its name in SPLITS."""
    if name == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if name.startswith("bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "bytes and words")
    return pre_tokenizers.Split(Regex(name), behavior="isolated")


def _note(header: GgufHeader, unknown: str | None) -> str:
    """What the file lost against the model that it was made from."""
    kinds = Counter(kind for kind, dims in header.tensors.values() if len(dims) > 1)
    quantised = ", ".join(
        f"{count} {kind}" for kind, count in kinds.most_common() if kind not in ("F32", "F16", "BF16")
    )
    parts = [
        f"its matrices were quantised ({quantised}); they are used in fp32, without what that lost"
        if quantised
        else f"its matrices are {', '.join(kinds)}; nothing else was lost"
    ]
    if header.architecture not in COMPARED_WITH_LLAMA_CPP:
        parts.append(f"the architecture {header.architecture} was never compared with llama.cpp here")
    return "; ".join([*parts, *filter(None, [unknown])])


if __name__ == "__main__":
    try:
        _convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        print(first_line(error))
        sys.exit(EXIT_USER)
