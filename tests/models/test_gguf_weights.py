"""`model: file.gguf`: what is opened computes what the file holds; everything else is refused in one line."""

import copy
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo.errors import UserError
from grpo.export.gguf_file import write_gguf
from grpo.models import gguf_weights
from grpo.models.gguf_header import read_header
from grpo.models.gguf_weights import SPLITS, _step, find_gguf
from grpo.models.loading import load_plain, load_tokenizer, resolve
from tests.support.launcher import fork_script, metrics_of
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 40, 99, 3, 250, 7, 7]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Dequantised models go to a folder of the test's own."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    gguf_weights._open.cache_clear()
    return tmp_path / "assets"


def in_f16(model):
    """The same model with weights that f16 holds exactly."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float() if parameter.ndim > 1 else parameter.data
    return model


def written(folder: Path, architecture: str = "qwen3", change=None, quant: str = "f16", tokenizer=None):
    """(file, the model that it was made from)."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = in_f16(tiny_model(architecture, len(tokenizer)))
    if change is not None:
        config = copy.deepcopy(model.config)
        change(config)
        state = model.state_dict()
        model = type(model)(config).eval()
        model.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "m.gguf"
    write_gguf(file, quant, model, tokenizer, "m")
    return file, model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def llama3(config) -> None:
    config.rope_parameters = {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("architecture, change", [("llama", None), ("qwen2", None), ("qwen3", None), ("llama", llama3)])
def test_the_model_that_is_opened_computes_what_the_file_was_made_from(tmp_path, architecture, change):
    tokenizer = taught("qwen2") if architecture == "qwen2" else None  # transformers opens these with no other
    file, model = written(tmp_path, architecture, change, tokenizer=tokenizer)
    opened = load_plain(str(file), CPU)
    assert torch.allclose(logits(opened), logits(model), atol=2e-5)
    assert opened.config.rope_parameters == model.config.rope_parameters
    if change is not None:
        plain = written(tmp_path / "other", architecture)[1]
        assert not torch.allclose(logits(opened), logits(plain), atol=2e-3)  # control: the frequencies do matter


def test_quantised_weights_are_those_that_gguf_itself_reads(tmp_path):
    file, _ = written(tmp_path, "llama", quant="q8_0")
    opened = load_plain(str(file), CPU)
    reader = gguf.GGUFReader(file)
    [stored] = [t for t in reader.tensors if t.name == "blk.0.ffn_down.weight"]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(opened.model.layers[0].mlp.down_proj.weight.detach().numpy(), values)


def test_the_folder_is_made_once_and_again_for_another_content(tmp_path, capfd):
    file, _ = written(tmp_path)
    first = resolve(str(file))
    made = Path(first, "model.safetensors").stat().st_mtime_ns
    gguf_weights._open.cache_clear()
    assert resolve(str(tmp_path)) == first  # the folder that holds the file
    assert Path(first, "model.safetensors").stat().st_mtime_ns == made
    notes = capfd.readouterr().err
    assert notes.count("is dequantised to fp32, once") == 1
    assert notes.count("its matrices are F16") == 2
    written(tmp_path, "llama")
    assert resolve(str(file)) != first


def test_an_interrupted_conversion_is_begun_again(tmp_path, cache):
    file, model = written(tmp_path)
    first = Path(resolve(str(file)))
    gguf_weights._open.cache_clear()
    left = first.with_name(first.name + ".partial")
    first.rename(left)
    (left / "model.safetensors").write_bytes(b"half")
    assert torch.allclose(logits(load_plain(str(file), CPU)), logits(model), atol=2e-5)
    assert not left.exists()


TEXTS = ("has  12 coins,  9\n\n\n x", "It's DON'T 1234567 \t end  ", "naïve 小明 😀", "x=3*(y+1)/2;   40  500")


def taught(name):
    """A tokenizer whose merges were learned with these rules, blanks and digits among them."""
    steps, whole_words = SPLITS[name]
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text * 20 for text in TEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_split_as_the_file_says(tmp_path, name):
    """Other rules than those that the merges were learned with give other tokens."""
    own = taught(name)
    file, _ = written(tmp_path, tokenizer=own)
    opened = load_tokenizer(str(file))
    for text in TEXTS:
        assert opened(text)["input_ids"] == own(text)["input_ids"], text
    assert opened.chat_template == own.chat_template


def test_a_tokenizer_that_transformers_opens_otherwise_is_refused(tmp_path):
    file, _ = written(tmp_path, "qwen2", tokenizer=taught("gpt-2"))
    with pytest.raises(UserError, match="its tokenizer cannot be kept: transformers opens it with another pre_token"):
        resolve(str(file))


def test_a_bos_is_added_when_the_file_says_so(tmp_path):
    own = tiny_tokenizer()
    own.bos_token = own.eos_token
    file, _ = written(tmp_path, tokenizer=own)
    plain = load_tokenizer(str(file))("a b")["input_ids"]
    data = bytearray(file.read_bytes())
    key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)
    at = data.index(key) + len(key)
    assert data[at] == 0
    data[at] = 1
    file.write_bytes(data)
    assert load_tokenizer(str(file))("a b")["input_ids"] == [own.bos_token_id, *plain]


def header_of(num_tensors: int = 0, num_settings: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_settings) + rest


def text_of(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


ARCHITECTURE = text_of("general.architecture") + struct.pack("<I", 8) + text_of("llama")
HUGE = 2**62
HOSTILE = {
    "not one": (b"GGML" + bytes(100), "no GGUF file"),
    "empty": (b"", "no GGUF file"),
    "another version": (header_of(version=9), "version 9"),
    "too short": (b"GGUF\3\0", "ends too early"),
    "many settings": (header_of(0, HUGE, ARCHITECTURE), "ends too early"),
    "many tensors": (header_of(HUGE, 1, ARCHITECTURE), "ends too early"),
    "a long text": (header_of(0, 1, text_of("x", HUGE)), "a text of"),
    "a long array": (header_of(0, 1, text_of("x") + struct.pack("<IIQ", 9, 4, HUGE)), "ends too early"),
    "a long array of texts": (header_of(0, 1, text_of("x") + struct.pack("<IIQ", 9, 8, HUGE)), "ends too early"),
    "arrays of arrays": (header_of(0, 1, text_of("x") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
    "an unknown type": (header_of(0, 1, text_of("x") + struct.pack("<I", 77)), "unknown type 77"),
    "a setting twice": (header_of(0, 2, ARCHITECTURE * 2), "occurs twice"),
    "no architecture": (header_of(), "no general.architecture"),
    "many dimensions": (
        header_of(1, 1, ARCHITECTURE + text_of("t") + struct.pack("<I", HUGE % 2**32 + 9)),
        "dimension",
    ),
    "no such kind of tensor": (
        header_of(1, 1, ARCHITECTURE + text_of("t") + struct.pack("<IQIQ", 1, 8, 99, 0)),
        "unknown type 99",
    ),
    "weights are missing": (
        header_of(1, 1, ARCHITECTURE + text_of("t") + struct.pack("<IQIQ", 1, 2**40, 0, 0)),
        "cut short",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_that_lies_is_refused_at_once(tmp_path, kind):
    content, reason = HOSTILE[kind]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        resolve(str(file))


def with_settings(file: Path, folder: Path, drop: str = "", **changed) -> Path:
    """A copy of a GGUF file with other settings, and without the tensors whose name contains `drop`."""
    reader = gguf.GGUFReader(file)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        kind, sub = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, sub)
    for name, (value, kind) in changed.items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if not drop or drop not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


FLOAT, INTEGER, TEXT = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
REFUSED = {
    "scaled positions": ({"qwen3.rope.scaling.type": ("yarn", TEXT)}, "rope.scaling.type = yarn"),
    "capped scores": ({"qwen3.attn_logit_softcapping": (50.0, FLOAT)}, "attn_logit_softcapping = 50"),
    "another window": ({"qwen3.attention.sliding_window": (7, INTEGER)}, "sliding_window = 7"),
    "one of several parts": ({"split.count": (3, INTEGER)}, "one of 3 parts"),
    "no model": ({"general.type": ("adapter", TEXT)}, "an adapter|a adapter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_would_leave_out_is_refused(tmp_path, kind):
    changed, reason = REFUSED[kind]
    file = with_settings(written(tmp_path)[0], tmp_path / "changed", **changed)
    with pytest.raises(UserError, match=reason):
        resolve(str(file))


def test_a_missing_weight_is_refused_and_never_drawn_at_random(tmp_path):
    file = with_settings(written(tmp_path)[0], tmp_path / "changed", drop="blk.1.ffn_up")
    with pytest.raises(UserError, match="weights"):
        resolve(str(file))


def test_an_unknown_architecture_is_named(tmp_path):
    file, _ = written(tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"qwen3", b"qwenX"))
    with pytest.raises(UserError, match="qwenX"):
        resolve(str(other))


def test_which_file_is_meant(tmp_path):
    file, _ = written(tmp_path / "m")
    (tmp_path / "m" / "n.gguf").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        find_gguf(tmp_path / "m")
    text = tmp_path / "weights.txt"
    text.write_text("hello")
    with pytest.raises(UserError, match="is a file and not GGUF"):
        find_gguf(text)
    (tmp_path / "m" / "config.json").write_text("{}")
    assert find_gguf(tmp_path / "m") is None
    assert find_gguf(file) == file


def test_the_header_is_read_as_gguf_itself_reads_it(tmp_path):
    file, _ = written(tmp_path)
    reader, header = gguf.GGUFReader(file), read_header(file)
    assert {t.name: tuple(map(int, t.shape)) for t in reader.tensors} == {n: d for n, (_, d) in header.tensors.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY:
            assert header.settings[name] == field.contents(), name


def test_a_run_on_two_processes_trains_a_gguf_file_and_asks_its_checkpoint(tmp_path):
    file, _ = written(tmp_path, quant="q8_0")
    (tmp_path / "q.csv").write_text("question,answer\na?,1\nb?,2\n")
    places = ("--output_dir", str(tmp_path / "o"), "--runs_dir", str(tmp_path / "r"))
    done = fork_script(
        "train.py",
        *("--model", str(file), "--data", str(tmp_path / "q.csv"), "--max_steps", "2", "--max_generate_length", "8"),
        *("--max_prompt_length", "32"),
        *("--rewards", '{"final_answer_reward": 1.0}', *places),
        nproc=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("its matrices were quantised") == 1
    assert [row["step"] for row in metrics_of(tmp_path / "r") if "reward/mean" in row] == [1, 2]
    asked = fork_script("inference.py", "--output_dir", str(tmp_path / "o"), "a?")
    assert asked.returncode == 0, asked.stderr[-2000:]
