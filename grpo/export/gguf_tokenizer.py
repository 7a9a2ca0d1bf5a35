"""GGUF: the tokenizer as llama.cpp reads it, or a refusal by name.

llama.cpp's rules for splitting text into words are code, chosen by a name in the file. So the tokenizer's rules are
compared with those that are known to be equal; similar rules would lower accuracy without any error. One difference
remains: a tokenizer may normalise text to Unicode's composed form (NFC), and llama.cpp does not; text that is in that
form already, as nearly all text is, is split the same way.
"""

import json
from collections.abc import Iterable
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from grpo.errors import UserError
from grpo.models.gguf_weights import SPLITS

KNOWN = {how: name for name, how in SPLITS.items()}
PROBES = (
    "Tom has 5 eggs. He buys 3, eats 2, finds 1234567890 and sells 1.\n",
    "  two  spaces\tand\ttabs \n\n\n  lines ",
    "It's DON'T we'Ll they'vE 's'S",
    'x=3*(y+1)/2; f(x)->{...} <a href="b">&amp;</a>',
    "小明有10个苹果，吃了3个，还剩几个？",
    "Größe, naïve café, Ελλάδα, Привет мир, שלום, مرحبا",
    "हिन्दी, ไทย",
    "😀 ½ ² Ⅷ ① ٣\u00a0\u3000\u200bend\r\nnext\r",
    "<think>\n</think> <answer>42</answer> #### 7",
    " ",
    "\n",
    "0 00 000 0000 00000",
    "#### 1,234.50€",
)


def _refuse(what: str) -> UserError:
    return UserError(f"to: gguf cannot write this tokenizer: {what}. Use --to merged_16bit.")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json, after checking that llama.cpp has an equal tokenizer. Raises UserError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse(f"{type(tokenizer).__name__} has no tokenizer.json")
    state = json.loads(backend.to_str())
    pre_tokenizer_name(state)
    for token in state["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise _refuse(f"its token {token['content'][:40]!r} has {flag}")
    ends_added(tokenizer)
    return state


def pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which this tokenizer splits text. Raises UserError when it has none."""
    model, normalizer = state["model"], state["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refuse(
            f"its model is {model['type']}{' with byte fallback' * bool(model.get('byte_fallback'))}, "
            "allowed: byte-level BPE"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refuse(f"its BPE has {key}")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refuse(f"its normalizer is {normalizer['type']}, allowed: none or NFC")
    steps = tuple(_step(entry) for entry in _flat(state["pre_tokenizer"]))
    name = KNOWN.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refuse(f"it cuts text in a way that llama.cpp is not known to have ({' + '.join(steps)[:120]})")
    return name


def _flat(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    if entry is None:
        return []
    return [step for part in entry["pretokenizers"] for step in _flat(part)] if entry["type"] == "Sequence" else [entry]


def _step(entry: dict[str, Any]) -> str:
    """A name for one step of splitting text, which determines the step."""
    if entry["type"] == "ByteLevel" and not entry["add_prefix_space"]:
        return "bytes and words" if entry["use_regex"] else "bytes"
    if entry["type"] == "Digits" and entry["individual_digits"]:
        return "digits"
    if entry["type"] == "Split" and entry["behavior"] == "Isolated" and not entry["invert"]:
        return str(entry["pattern"].get("Regex"))
    return f"{entry['type']} { ({key: value for key, value in entry.items() if key != 'type'}) }"


def ends_added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer adds bos before, and eos after every text. Raises UserError if it adds anything else."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    full = tokenizer("a b")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for front in (False, True):
        for back in (False, True):
            if full == bos * front + plain + eos * back:
                return front, back
    raise _refuse(f"it makes {str(full)[:60]} of a text of tokens {plain}, neither bos before nor eos after it")


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: Iterable[int]
) -> None:
    """Write tokens, merges, special tokens and the chat template. Raises UserError when llama.cpp cannot hold them."""
    state = check_tokenizer(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(state))
    tokens, kinds = vocabulary(state, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = state["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for ids, add in zip(
        _ends(tokenizer, stop_ids), (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    ):
        add(ids)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    bos_added, eos_added = ends_added(tokenizer)
    writer.add_add_bos_token(bos_added)  # always written, because llama.cpp's default depends on the name above
    writer.add_add_eos_token(eos_added)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def _ends(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> list[int]:
    """The tokens that end an answer, the tokenizer's eos first."""
    ids = sorted(set(stop_ids), key=lambda i: (i != tokenizer.eos_token_id, i))
    if not 1 <= len(ids) <= 3:
        raise _refuse(f"{len(ids)} tokens end an answer, GGUF has places for 1 to 3")
    return ids


def vocabulary(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """The text and type of every id; ids of the model that the tokenizer does not have are marked as unused."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, i in state["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in state["added_tokens"]:
        i = added["id"]
        tokens[i], kinds[i] = added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, kinds
