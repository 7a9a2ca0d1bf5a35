"""Exports that are folders: whole or absent, opened by plain transformers and peft, and every refusal one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo.checkpoints.contents import step_of
from grpo.checkpoints.manifest import verify, write_manifest
from grpo.evaluate.ask import CheckpointModel
from grpo.export import command, folders
from grpo.export.command import main
from grpo.export.source import Source
from grpo.models.quantization import dequantize
from tests.support.launcher import PROJECT
from tests.support.taught import taught_checkpoint
from tests.support.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

SETTINGS = ["--max_prompt_length", "96", "--max_generate_length", "64"]
CPU = torch.device("cpu")
QUESTION, ANSWER = "Mia has 7 pears. She buys 3. How many?", "7, buys 3: 10.\n#### 10"


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    return taught_checkpoint(tmp_path_factory.mktemp("taught") / "checkpoint_3", [(QUESTION, {}, ANSWER)], SETTINGS)


def adapter_checkpoint(base: Path, folder: Path, zero: bool = False) -> Path:
    """A LoRA checkpoint on `base`, its B matrices drawn at random, or zero as before training."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=8),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not zero:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "trainer").mkdir()
    for name in ("state.json", "recipe.json"):
        (folder / "trainer" / name).write_bytes((base / "trainer" / name).read_bytes())
    write_manifest(folder, step_of(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(taught, tmp_path_factory) -> Path:
    return adapter_checkpoint(taught, tmp_path_factory.mktemp("adapter") / "checkpoint_4")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.float()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_merged_folder_holds_the_weights_rounded_once_and_nothing_is_lost(taught, tmp_path, dtype):
    out = tmp_path / "out"
    assert main(["--checkpoint", str(taught), "--to", "merged_16bit", "--dtype", dtype, "--out", str(out)]) == 0
    there = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    kind = folders.DTYPES[dtype]
    weights = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32).state_dict()
    assert there.dtype == kind and there.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(kind)) for name, tensor in there.state_dict().items())
    assert (out / "trainer/recipe.json").read_bytes() == (taught / "trainer/recipe.json").read_bytes()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(taught).get_vocab()
    assert verify(out) is None  # so inference.py opens it
    checkpoint_model = CheckpointModel(out, CPU, {"temperature": 0.0}, 64)
    assert checkpoint_model.ask(checkpoint_model.encode(QUESTION)).text == ANSWER


def test_the_chat_template_travels_along(taught, tmp_path):
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    (folder / "trainer").mkdir()
    for path in (path for path in taught.rglob("*") if path.is_file()):
        (folder / path.relative_to(taught)).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    write_manifest(folder, 3)
    out = tmp_path / "out"
    assert main(["--checkpoint", str(folder), "--to", "merged_16bit", "--out", str(out)]) == 0
    text = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<x>"


def test_a_merged_adapter_opens_without_peft_and_computes_the_same(taught, adapter, tmp_path):
    out = tmp_path / "out"
    assert main(["--checkpoint", str(adapter), "--to", "merged_16bit,lora", "--out", str(out)]) == 0
    before = logits(AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(base, out / "lora"))
    whole = Source(adapter).model()
    change = (before - wanted).abs().max()
    assert (logits(whole) - wanted).abs().max() < 1e-4 < change
    merged = AutoModelForCausalLM.from_pretrained(out / "merged_16bit", dtype=torch.float32)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16().float()), name
    assert (logits(merged) - wanted).abs().max() < change / 20  # bf16's rounding, not a lost adapter
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(out / "merged_16bit")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lora_is_the_adapter_as_it_was(adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--checkpoint", str(adapter), "--to", "lora", "--out", str(out)]) == 0
    assert "LoRA weights saved and verified." in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert verify(out) is None


def test_four_bits_are_opened_by_transformers_again(taught, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert main(["--checkpoint", str(taught), "--to", "merged_4bit", "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"} and model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    weights = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32).state_dict()
    for name, tensor in dequantize(model).state_dict().items():
        error = float((tensor.float() - weights[name]).square().mean() / weights[name].square().mean())
        assert (1e-4 if "_proj" in name else 0) <= error < (0.1 if "_proj" in name else 1e-5), name


def test_without_bitsandbytes_four_bits_are_refused(taught, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["--checkpoint", str(taught), "--to", "merged_4bit", "--out", str(tmp_path / "out")]) == 2
    assert "needs bitsandbytes" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


REFUSED = [
    (["--to", "gguf,onnx"], "to: must be of merged_16bit, merged_4bit, lora, gguf, got 'onnx'"),
    (["--to", "merged_16bit,"], "to: must be of"),
    (["--to", "gguf", "--quant", "q3_k"], "quant: must be of f16, q8_0, q5_k_m, q4_k_m, got 'q3_k'"),
    (["--to", "merged_16bit", "--quant", "f16"], "quant: goes with --to gguf"),
    (["--to", "gguf", "--dtype", "f16"], "dtype: goes with --to merged_16bit"),
    (["--to", "lora"], "to: lora needs an adapter"),
    (["--to", "merged_16bit", "--public"], "they go with --push"),
    (["--to", "merged_16bit", "--dry_run"], "they go with --push"),
    (["--to", "merged_16bit", "--metrics", "nothing.jsonl"], "metrics: nothing.jsonl cannot be read"),
    (["--to", "merged_16bit", "--push", "name"], "push: must be user/name"),
    (["--to", "merged_16bit", "--push", "a/b\nc"], "push: must be user/name"),
    (["--to", "merged_16bit", "--push", "../b"], "push: must be user/name"),
    (["--to", "merged_16bit", "--checkpoint", "nowhere"], "checkpoint: no model in nowhere"),
    (["--to", "merged_16bit", "--checkpoint", "demo/base"], "MANIFEST.json is missing"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=[" ".join(words)[:40] for words, _ in REFUSED])
def test_refusals_are_one_line_and_leave_nothing(taught, tmp_path, capsys, monkeypatch, words, reason):
    monkeypatch.chdir(PROJECT)
    assert main(["--checkpoint", str(taught), "--out", str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr()
    assert reason in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "{t}/out"],
        ["--to", "gguf", "--out", "{t}/out"],
        ["--push", "a/b", "--out", "{t}", "--metrics", "m"],
        ["--push", "a/b", "--out", "{t}/out"],
    ],
)
def test_half_a_command_is_refused(tmp_path, capsys, words):
    assert main([word.format(t=tmp_path) for word in words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", [["--to", "gguf"], ["--out", "x", "--dtype", "fp32"], ["--out", "x", "--token", "t"]])
def test_what_argparse_refuses_ends_in_one_line_as_well(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "usage" not in error


def test_what_stands_at_out_is_never_overwritten(taught, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        assert main(["--checkpoint", str(taught), "--to", "merged_16bit", "--out", str(tmp_path / name)]) == 2
        assert "exists, and is never overwritten" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert main(["--checkpoint", str(taught), "--to", "merged_16bit", "--out", str(tmp_path / "checkpoint_9")]) == 2
    assert "would be taken for one" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--checkpoint", str(taught), "--to", "merged_16bit", "--out", str(tmp_path / "empty")]) == 0
    assert verify(tmp_path / "empty") is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["no space", "ctrl-c"]
)
def test_an_export_that_fails_half_way_leaves_nothing(taught, tmp_path, monkeypatch, capsys, error):
    def fail(source, folder):
        assert any(path.suffix == ".safetensors" for path in folder.rglob("*"))  # half of it stands
        raise error

    monkeypatch.setattr(folders, "complete", fail)
    words = ["--checkpoint", str(taught), "--to", "merged_16bit", "--out", str(tmp_path / "out")]
    if isinstance(error, OSError):
        assert main(words) == 2
        assert "could not be written: [Errno 28] No space left on device" in capsys.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            main(words)
    assert list(tmp_path.iterdir()) == []


def test_an_export_appears_whole_by_one_rename(taught, tmp_path, monkeypatch):
    renamed, move = [], os.rename

    def rename(old, new):
        assert verify(Path(old)) is None and (Path(old) / "README.md").exists() and not Path(new).exists()
        renamed.append((Path(old).parent, Path(new)))
        move(old, new)

    monkeypatch.setattr(command.os, "rename", rename)
    assert main(["--checkpoint", str(taught), "--to", "merged_16bit", "--out", str(tmp_path / "out")]) == 0
    assert renamed == [(tmp_path, tmp_path / "out")] and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_adapter_that_changes_nothing_is_refused(taught, tmp_path, capsys):
    zero = adapter_checkpoint(taught, tmp_path / "checkpoint_5", zero=True)
    for method in ("lora", "merged_16bit"):
        assert main(["--checkpoint", str(zero), "--to", method, "--out", str(tmp_path / "out")]) == 2
        assert "all its weights are zero" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path, taught, capsys):
    model = tiny_model("qwen3", len(tiny_tokenizer()))
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    folder = tmp_path / "checkpoint_3"
    (folder / "trainer").mkdir(parents=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in ("state.json", "recipe.json"):
        (folder / "trainer" / name).write_bytes((taught / "trainer" / name).read_bytes())
    write_manifest(folder, 3)
    assert main(["--checkpoint", str(folder), "--to", "merged_16bit", "--out", str(tmp_path / "out")]) == 2
    assert "model.layers.1.mlp.up_proj.weight of" in capsys.readouterr().err
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 7e4  # beyond f16
    model.save_pretrained(folder)
    write_manifest(folder, 3)
    for words, reason in ((["merged_16bit", "--dtype", "f16"], "beyond f16's 65504"), (["gguf"], "beyond f16's 65504")):
        assert main(["--checkpoint", str(folder), "--to", *words, "--out", str(tmp_path / "out")]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


GGUF = {"llama", "qwen2", "qwen3"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_architectures_go_where(architecture, taught, tmp_path, capsys):
    """Every one merged in 16 and in 4 bits; gguf for three, and the others refused by name."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "checkpoint_3"
    save_tiny(folder, architecture)
    (folder / "trainer").mkdir()
    for name in ("state.json", "recipe.json"):
        (folder / "trainer" / name).write_bytes((taught / "trainer" / name).read_bytes())
    write_manifest(folder, 3)
    capsys.readouterr()
    words = ["--checkpoint", str(folder), "--to", "merged_16bit,merged_4bit", "--out", str(tmp_path / "out")]
    assert main(words) == 0, capsys.readouterr().err
    for form in ("merged_16bit", "merged_4bit"):
        assert verify(tmp_path / "out" / form) is None
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / form)
    code = main(["--checkpoint", str(folder), "--to", "gguf", "--out", str(tmp_path / "gguf")])
    kind = AutoConfig.from_pretrained(folder).model_type
    refused = f"to: gguf cannot write the architecture {kind!r}"
    assert (code == 0) == (architecture in GGUF) == (refused not in capsys.readouterr().err)
    assert (tmp_path / "gguf" / "model-f16.gguf").exists() == (architecture in GGUF)


def test_without_llama_cpp_f16_is_written_and_says_what_was_not_tried(taught, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("grpo.export.gguf_file.has_llama_cpp", lambda: False)
    words = ["--checkpoint", str(taught), "--to", "gguf", "--out", str(tmp_path / "out"), "--quant"]
    assert main([*words, "q4_k_m"]) == 2
    assert "pip install 'grpo-torchrun[gguf]'" in capsys.readouterr().err
    assert main([*words, "f16,q8_0"]) == 0
    assert "was not tried in llama.cpp" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {"model-f16.gguf", "model-q8_0.gguf"}
