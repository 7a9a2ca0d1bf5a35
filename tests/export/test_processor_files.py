"""Files of processors travel with checkpoints and exports: settings only, never code or pickles."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from grpo.checkpoints import background as saving
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.manifest import verify
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from grpo.export.command import main
from grpo.models.loading import load_tokenizer
from grpo.models.lora import adapter_tensors
from grpo.models.processor_files import processor_files
from grpo.runtime.distributed import World
from grpo.training.load_policy import load_policy
from tests.models.test_lora_families import family
from tests.support.tiny import tiny_tokenizer

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
FILES = {
    "preprocessor_config.json": IMAGES,
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    "audio_tokenizer_config.json": {"audio_tokenizer_class": "DacModel"},
}
GENERATION = {"top_k": 20, "eos_token_id": [0, 1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A vision model with the files of its processors, code and a pickle beside them."""
    folder = tmp_path_factory.mktemp("vlm") / "base"
    model = family("gemma3")
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name, content in {**FILES, "generation_config.json": GENERATION}.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "processing_own.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"\x80\x04N.")
    return folder


def save(base: Path, folder: Path, **settings) -> Path:
    cfg = Config(model=str(base), data="d", rewards={"r": 1.0}, **settings)
    policy = load_policy(cfg, ALONE)
    if cfg.lora_r:
        for matrix in adapter_tensors(policy.model).values():
            matrix.data += 0.1
    files = saving.serialized_tokenizer(load_tokenizer(str(base)))
    policy.counters = dataclasses.replace(policy.counters, step=3)
    facts = {"versions": {}, "data": "d"}
    snapshot = checkpoint.take_snapshot(3, policy, files, Recipe(questions=["Mia?"]), cfg, facts)
    folder.mkdir()
    assert checkpoint.write_snapshot(snapshot, folder, ALONE, None, lambda phase: None) is None
    return folder / "checkpoint_3"


def check_files(folder: Path) -> None:
    for name, content in FILES.items():
        assert json.loads((folder / name).read_text()) == content, name
    assert list(AutoImageProcessor.from_pretrained(folder).image_std) == IMAGES["image_std"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".py", ".bin")]
    assert verify(folder) is None


def test_checkpoints_and_exports_have_them(base, tmp_path):
    whole = save(base, tmp_path / "whole")
    check_files(whole)
    kept = json.loads((whole / "generation_config.json").read_text())
    assert {name: kept[name] for name in GENERATION} == GENERATION
    adapter = save(base, tmp_path / "adapter", lora_r=2)
    check_files(adapter)
    for to, source in (("merged_16bit", adapter), ("merged_16bit", whole), ("lora", adapter)):
        out = tmp_path / f"{to}-{source.parent.name}"
        assert main(["--checkpoint", str(source), "--to", to, "--out", str(out)]) == 0
        check_files(out)
    # a checkpoint of an older version has none: those of the base
    for name in FILES:
        (adapter / name).unlink()
    assert processor_files(str(adapter), True).keys() == FILES.keys()


def test_an_old_chat_template_is_copied_only_where_it_is_the_only_one(base, tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text("{}")
    assert processor_files(str(tmp_path), True) == {}
    assert processor_files(str(tmp_path), False).keys() == {"chat_template.json"}
    assert processor_files("", False) == {}, "a tokenizer that was made in memory belongs to no folder"


@pytest.mark.parametrize("content", ['{"auto_map": {"AutoProcessor": "own.P"}}', "{", '{"a": 1, "a": 2}'])
def test_a_file_that_wants_to_run_code_or_is_broken_is_refused(tmp_path, content):
    (tmp_path / "audio_tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be copied"):
        processor_files(str(tmp_path), True)
