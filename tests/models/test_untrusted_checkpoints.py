"""Model folders and checkpoints of unknown origin, entered by all three doors: --model, resume, inference.py.

Each attack spoils a folder that was fine a moment before, and fixes the manifest as its author would. It must end in
one line and exit code 2, or the checkpoint before it is used; no canary file may appear. The control: the unspoiled
folder trains, resumes and answers.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import inference
import train
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.manifest import MANIFEST, manifest_text
from grpo.checkpoints.resume import SavedMoments, read_state
from grpo.config.command_line import load_config
from grpo.errors import UserError
from grpo.models.checks import check_vocabulary, load_model, stop_token_ids
from grpo.models.loading import load_tokenizer
from grpo.run.main import run_main
from grpo.strict_json import parse_json
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

TALLY = {
    "model folders, by --model": [0, 0, 0],
    "checkpoints, on resume": [0, 0, 0],
    "checkpoints, by inference.py": [0, 0, 0],
}


def training(model, folder, *extra, num_rows=4):
    """One or two steps through the same main as the script's. Returns the exit code."""
    rows = folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(num_rows)))
    return run_main(
        train.train,
        load_config,
        [
            "--model",
            str(model),
            "--data",
            str(rows),
            "--rewards",
            '{"final_answer_reward": 1}',
            "--save_steps",
            "1",
            "--output_dir",
            str(folder / "output"),
            "--runs_dir",
            str(folder / "runs"),
            "--max_prompt_length",
            "40",
            "--max_generate_length",
            "6",
            "--num_generations",
            "2",
            "--batch_size",
            "1",
            "--max_steps",
            "2",
            "--reward_workers",
            "0",
            *extra,
        ],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder, and an output folder with checkpoint_1 and checkpoint_2."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny(folder / "model")
    assert training(folder / "model", folder) == 0
    yield folder
    print(f"\n{'kind':34}{'tried':>6}{'refused':>9}{'left to loading':>17}{'other':>7}")
    for kind, (tried, refused, later) in TALLY.items():
        print(f"{kind:34}{tried:6}{refused:9}{later:17}{tried - refused - later:7}")


def reseal(folder):
    """A manifest that holds for what lies there now, links left out: what an attacker would write."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    (folder / MANIFEST).write_text(manifest_text(2, files))


def pickled(canary):
    """What unpickling would run; written by hand, since nothing here may import pickle."""
    return b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."


def header(name, dtype="F32", shape=(2,), offsets=(0, 8), data=b"\0" * 8, length=None):
    text = json.dumps({name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def edit(name, **values):
    """Change keys of a JSON file."""

    def spoil(folder, canary):
        path = folder / name
        facts = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**facts, **values}))

    return spoil


def put(name, content):
    """Write a file; content may be a function of the canary."""

    def spoil(folder, canary):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content(canary) if callable(content) else content)

    return spoil


def in_place_of_weights(name, content):
    def spoil(folder, canary):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content(canary) if callable(content) else content)

    return spoil


def special(make, name="model.safetensors"):
    """A thing that is no regular file where one belongs."""

    def spoil(folder, canary):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def index(target):
    def spoil(folder, canary):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder.parent / "outside.safetensors").write_bytes(header("x"))
        (folder / "evil.bin").write_bytes(pickled(canary))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, target)}))

    return spoil


def reshaped(change):
    """Weights whose tensors were changed."""

    def spoil(folder, canary):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def drop_layer(weights):
    for name in [name for name in weights if ".1." in name]:
        del weights[name]


def wrong_shape(weights):
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = weights[name][:-1].clone()


NESTED = b"[" * 10**5
CODE = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None], "AutoModelForCausalLM": "evil.Model"}
MODEL_ATTACKS = {  # what is done to a folder with model.safetensors, config.json and a tokenizer
    "pickle in place of weights": in_place_of_weights("pytorch_model.bin", pickled),
    "pickle called safetensors": put("model.safetensors", pickled),
    "index to a pickle": index("evil.bin"),
    "index outside": index("../outside.safetensors"),
    "index absolute": index("/etc/passwd"),
    "index nested": put("model.safetensors.index.json", NESTED),
    "header of 200 MB": put("model.safetensors", header("x", length=200_000_000)),
    "header beyond the file": put("model.safetensors", header("x", length=2**63)),
    "header bomb": put("model.safetensors", struct.pack("<Q", 10**6) + b"[" * 10**6),
    "header key twice": put("model.safetensors", struct.pack("<Q", 14) + b'{"a":1,"a":2} '),
    "offsets overlap": put("model.safetensors", header("x", offsets=(4, 12))),
    "offsets out of range": put("model.safetensors", header("x", shape=(2**40,), offsets=(0, 2**42))),
    "offsets negative": put("model.safetensors", header("x", offsets=(-8, 0))),
    "data nobody names": put("model.safetensors", header("x", data=b"\0" * 64)),
    "unknown dtype": put("model.safetensors", header("x", dtype="OBJECT")),
    "empty weights": put("model.safetensors", b""),
    "weights missing": reshaped(drop_layer),
    "wrong shape": reshaped(wrong_shape),
    "auto_map in config": edit("config.json", auto_map=CODE),
    "auto_map deep in config": edit("config.json", text_config={"auto_map": CODE}),
    "auto_map in tokenizer": edit("tokenizer_config.json", auto_map=CODE),
    "auto_map in processor": edit("processor_config.json", auto_map=CODE),
    "code as attention": edit("config.json", attn_implementation="evil/kernel"),
    "code as sub-attention": edit("config.json", _attn_implementation={"": "evil/kernel:f"}),
    "config nested": put("config.json", NESTED),
    "config with NaN": put("config.json", b'{"model_type": "qwen3", "rope_theta": NaN}'),
    "config is a list": put("config.json", b"[]"),
    "unknown model_type": edit("config.json", model_type="../../evil"),
    "layers without end": edit("config.json", num_hidden_layers=10**9),
    "vocabulary without end": edit("config.json", vocab_size=10**12),
    "sizes of the wrong type": edit("config.json", hidden_size="32"),
    "no heads": edit("config.json", num_attention_heads=0),
    "adapter to elsewhere": edit("adapter_config.json", base_model_name_or_path="/elsewhere", peft_type="LORA"),
    "tokenizer cut": put("tokenizer.json", b'{"version": "1.0", "model": {"ty'),
    "tokenizer nested": put("tokenizer.json", NESTED),
    "tokenizer is null": put("tokenizer.json", b"null"),
    "template writes elsewhere": edit("tokenizer_config.json", chat_template=[{"name": "../../x", "template": "a"}]),
    "template of 2 MB": put("chat_template.jinja", b"x" * 2**21),
    "EOS beyond the vocabulary": edit("generation_config.json", eos_token_id=10**9),
    "EOS of the wrong type": edit("generation_config.json", eos_token_id=[[0]]),
    "generation config nested": put("generation_config.json", NESTED),
    "FIFO as weights": special(os.mkfifo),
    "FIFO as config": special(os.mkfifo, "config.json"),
    "FIFO as tokenizer": special(os.mkfifo, "tokenizer.json"),
    "device as weights": special(lambda path: path.symlink_to("/dev/zero")),
    "dangling link": special(lambda path: path.symlink_to("/nowhere/model.safetensors")),
    "folder as weights": special(Path.mkdir),
    "folder as config": special(Path.mkdir, "config.json"),
}


def manifest(change):
    """Change the manifest's text or object."""

    def spoil(folder, canary):
        path = folder / MANIFEST
        facts = json.loads(path.read_text())
        changed = change(facts)
        path.unlink()
        path.write_bytes(
            changed if isinstance(changed, bytes) else manifest_text(facts.get("step"), facts.get("files")).encode()
        )

    return spoil


def also_list(name):
    return manifest(lambda facts: facts["files"].update({name: facts["files"]["config.json"]}))


def linked(name):
    """Move a file or a folder out, and leave a link to it."""

    def spoil(folder, canary):
        target = folder.parent / f"moved-{Path(name).name}"
        shutil.move(folder / name, target)
        (folder / name).symlink_to(target)

    return spoil


def twice(facts):
    text = json.dumps(facts)
    return text.replace('"files": {', '"files": {"config.json": {"bytes": 1, "sha256": "' + "0" * 64 + '"}, ').encode()


MANIFEST_ATTACKS = {  # after which the manifest is not fixed
    "lists a file above": also_list("../config.json"),
    "lists an absolute path": also_list("/etc/passwd"),
    "lists a dotted path": also_list("./config.json"),
    "lists a hidden character": also_list("config\u200b.json"),
    "lists a look-alike": also_list("c\u043enfig.json"),
    "lists a backslash": also_list("..\\config.json"),
    "lists a NUL": also_list("config.json\0"),
    "lists a file twice": manifest(twice),
    "linked file": linked("config.json"),
    "linked folder": linked("trainer"),
    "linked manifest": linked(MANIFEST),
    "not listed, but opened": put("added_tokens.json", b"{}"),
    "pickle beside, not listed": put("pytorch_model.bin", pickled),
    "code beside, not listed": put("modeling_evil.py", lambda canary: f"open({str(canary)!r}, 'w')".encode()),
    "folder for a file": special(Path.mkdir, "generation_config.json"),
    "FIFO for a file": special(os.mkfifo, "generation_config.json"),
    "FIFO for the manifest": special(os.mkfifo, MANIFEST),
    "manifest of 20 MB": put(MANIFEST, b" " * 20_000_000 + b"{}"),
    "manifest nested": put(MANIFEST, b'{"files": ' * 10**5),
    "manifest with NaN": manifest(lambda facts: facts["files"]["config.json"].update(bytes=float("nan"))),
    "manifest with a text for a number": manifest(lambda facts: facts["files"]["config.json"].update(bytes="12")),
    "manifest lists nothing": manifest(lambda facts: facts.update(files={})),
    "manifest is a list": put(MANIFEST, b"[]"),
    "manifest is not UTF-8": put(MANIFEST, b"\xff\xfe{}"),
}
TRAINER_ATTACKS = {
    "state nested": put("trainer/state.json", NESTED),
    "state with NaN": put("trainer/state.json", b'{"counters": {"step": NaN}, "config": {}}'),
    "state is a list": put("trainer/state.json", b"[]"),
    "recipe nested": put("trainer/recipe.json", NESTED),
    "moments are a pickle": put("trainer/optimizer-00000-of-00001.safetensors", pickled),
    "moments' header of 200 MB": put("trainer/optimizer-00000-of-00001.safetensors", header("x", length=2 * 10**8)),
}


def spoiled(trained, folder, spoil, canary):
    """A copy of checkpoint_2 with an attack, sealed by its author where that is of use."""
    copy = folder / "output" / "checkpoint_2"
    shutil.copytree(trained / "output" / "checkpoint_1", folder / "output" / "checkpoint_1")
    shutil.copytree(trained / "output" / "checkpoint_2", copy)
    spoil(copy, canary)
    if spoil not in MANIFEST_ATTACKS.values():
        reseal(copy)
    return copy


def one_error(capfd):
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_model_folders(trained, tmp_path, capfd, name):
    """--model DIR: one line, exit code 2, nothing trained."""
    canary = tmp_path / "canary"
    shutil.copytree(trained / "model", tmp_path / "model")
    MODEL_ATTACKS[name](tmp_path / "model", canary)
    TALLY["model folders, by --model"][0] += 1
    assert training(tmp_path / "model", tmp_path) == 2
    assert "model" in one_error(capfd)
    assert not canary.exists() and not list((tmp_path / "output").glob("checkpoint_*"))
    TALLY["model folders, by --model"][1] += 1


LATER = {
    "weights missing",
    "unknown model_type",
    "sizes of the wrong type",
    "no heads",
    "tokenizer cut",
    "tokenizer nested",
    "tokenizer is null",
    "EOS beyond the vocabulary",
    "EOS of the wrong type",
}
EVERY = {**MODEL_ATTACKS, **MANIFEST_ATTACKS, **TRAINER_ATTACKS}


@pytest.mark.parametrize("name", EVERY)
def test_checkpoints(trained, tmp_path, capfd, name):
    """Inference refuses it; resume takes the one before, or, where only a library finds out, refuses in one line."""
    canary = tmp_path / "canary"
    folder = spoiled(trained, tmp_path, EVERY[name], canary)
    notices = []
    resume, asked = TALLY["checkpoints, on resume"], TALLY["checkpoints, by inference.py"]
    resume[0] += 1
    asked[0] += 1
    used = checkpoint.newest_valid(tmp_path / "output", notices.append)
    if name in LATER:
        assert used == folder
        resume[2] += 1
    else:
        assert used == tmp_path / "output" / "checkpoint_1"
        assert len(notices) == 1 and "checkpoint_2 is not used: " in notices[0] and "\n" not in notices[0]
        resume[1] += 1
    assert inference.main(["--checkpoint", str(folder), "2+2?"]) == 2
    assert one_error(capfd)
    assert not canary.exists()
    asked[1] += 1


def test_the_controls(trained, tmp_path, capfd):
    """Nothing spoiled, resealed: valid, and it answers. A hub model's pickle beside its safetensors is left alone."""
    folder = spoiled(trained, tmp_path, lambda folder, canary: None, tmp_path / "canary")
    assert checkpoint.verify(folder) is None
    assert inference.main(["--checkpoint", str(folder), "2+2?"]) == 0
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickled(tmp_path / "canary"))
    (tmp_path / "model" / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edit("tokenizer_config.json", tokenizer_class="EvilTokenizer")(tmp_path / "model", None)
    with contextlib.suppress(UserError):  # an unknown class may be refused, or read as a plain tokenizer.json
        load_tokenizer(str(tmp_path / "model"))
    load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert not (tmp_path / "canary").exists()


def test_a_run_goes_on_from_the_checkpoint_before(trained, tmp_path, capfd):
    """Through the whole trainer: checkpoint_2 is hostile, so step 2 is done again from checkpoint_1."""
    shutil.copytree(trained / "model", tmp_path / "model")
    assert training(tmp_path / "model", tmp_path) == 0
    folder = tmp_path / "output" / "checkpoint_2"
    before = (folder / "model.safetensors").read_bytes()
    MODEL_ATTACKS["pickle in place of weights"](folder, tmp_path / "canary")
    reseal(folder)
    assert training(tmp_path / "model", tmp_path, "--deterministic", "false") == 0
    said = capfd.readouterr()
    assert f"{folder} is not used: its weights are a pickle (pytorch_model.bin)" in said.err
    assert checkpoint.verify(folder) is None and not (tmp_path / "canary").exists()
    assert (folder / "model.safetensors").read_bytes() == before, "step 2 again gives step 2"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"step": -1}, "counters: step"),
        ({"step": True}, "counters: step"),
        ({"updates": 1.5}, "counters: updates"),
        ({"trust_sampler": "yes"}, "counters: trust_sampler"),
        ({"unknown": 1}, "unknown"),
        ({"step": 2**70}, "step"),
    ],
)
def test_counters_of_the_wrong_kind(trained, tmp_path, change, said):
    (tmp_path / "trainer").mkdir()
    state = json.loads((trained / "output" / "checkpoint_2" / "trainer" / "state.json").read_text())
    path = tmp_path / "trainer" / "state.json"
    path.write_text(json.dumps(state))
    assert read_state(tmp_path)["counters"].step == 2
    path.write_text(json.dumps({**state, "counters": {**state["counters"], **change}}))
    with pytest.raises(UserError, match=said):
        read_state(tmp_path)


def test_moments_must_be_there_once_and_finite(tmp_path):
    """A piece twice hides that another is missing: the count of elements alone would be right."""

    def saved(**pieces):
        shutil.rmtree(tmp_path / "trainer", ignore_errors=True)
        (tmp_path / "trainer").mkdir()
        for i, values in enumerate(pieces.values()):
            save_file(values, tmp_path / "trainer" / f"optimizer-{i:05d}-of-00002.safetensors")
        return SavedMoments(tmp_path)

    five, nan = torch.arange(5.0), torch.full((5,), float("nan"))
    whole = saved(a={"w|m|0": five}, b={"w|m|5": five})
    assert whole.read("w", "m", 0, 10).tolist() == [*range(5), *range(5)]
    assert whole.read("w", "m", 3, 4).tolist() == [3, 4, 0, 1]
    for bad in (saved(a={"w|m|0": five}, b={"w|m|0": five}), saved(a={"w|m|0": five}, b={"w|m|6": five})):
        with pytest.raises(UserError, match="holds 5 of 10 elements in a row"):
            bad.read("w", "m", 0, 10)
    with pytest.raises(UserError, match="NaN or Inf"):
        saved(a={"w|m|0": nan}).read("w", "m", 0, 5)
    for key in ("w", "w|m|x", "w|m|-1", "|m|0"):
        with pytest.raises(UserError, match="is no piece of a moment"):
            saved(a={key: five})
    with pytest.raises(UserError, match="is no piece of a moment"):
        saved(a={"w|m|0": five.long()})


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3])
def test_fewer_rows_than_a_step_takes_and_one_more(trained, tmp_path, capfd, num_rows):
    """P = 2 prompts a step, 2 epochs: ceil(2 rows / P) steps, or a refusal where there is no row."""
    code = training(trained / "model", tmp_path, "--max_steps", "null", "--epoch", "2", num_rows=num_rows)
    steps = [checkpoint.step_of(folder) for folder in checkpoint.checkpoint_folders(tmp_path / "output")]
    assert (code, max(steps, default=0)) == ((2, 0) if num_rows == 0 else (0, num_rows))
    assert num_rows or "is empty" in one_error(capfd)


def test_links_in_a_model_folder_are_followed(trained, tmp_path):
    """Model caches are made of links; in a checkpoint, which the trainer wrote, they are refused."""
    (tmp_path / "model").mkdir()
    for path in (trained / "model").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    load_tokenizer(str(tmp_path / "model"))
    load_model(str(tmp_path / "model"), torch.device("cpu"))


def test_tokenizers_of_all_kinds():
    """No pad, pad is EOS, two EOS ids, none, fewer tokens than the model: fine. More tokens than the model: refused."""
    model = tiny_model("qwen3", vocab_size=300)
    without = tiny_tokenizer(pad=False)
    assert len(without) == 300
    check_vocabulary(model, without)
    check_vocabulary(model, tiny_tokenizer(280))
    assert isinstance(tiny_tokenizer(280).decode([299, 5]), str)  # what a model with more tokens may sample
    assert stop_token_ids(model, without) == {0}
    model.generation_config.eos_token_id = [0, 1]
    assert stop_token_ids(model, tiny_tokenizer()) == {0, 1}
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    without.eos_token = None
    assert stop_token_ids(model, without) == frozenset()
    more = tiny_tokenizer()
    more.add_tokens([f"<new{i}>" for i in range(60)])
    with pytest.raises(UserError, match=r"tokens beyond the model's 300, such as '<new\d+>' with id 300"):
        check_vocabulary(model, more)
    for ids in (-1, 300, [0, 10**9], True, "0"):
        model.generation_config.eos_token_id = ids
        with pytest.raises(UserError, match="eos_token_id must be tokens of the model, 0 to 299"):
            stop_token_ids(model, without)


def test_a_run_with_tokens_beyond_the_model_is_refused_before_training(trained, tmp_path, capfd):
    shutil.copytree(trained / "model", tmp_path / "model")
    more = tiny_tokenizer()
    more.add_tokens([f"<new{i}>" for i in range(60)])
    more.save_pretrained(tmp_path / "model")
    assert training(tmp_path / "model", tmp_path) == 2
    assert "tokens beyond the model's" in one_error(capfd)


def test_json_is_read_strictly():
    for text, said in (
        ("NaN", "NaN is no"),
        ("[1e999]", "1e999"),
        ("-Infinity", "Infinity"),
        ("[" * 10**5, "deeply"),
        (b"\xff", "utf-8"),
        ('{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_json(text)
    assert parse_json("[1.5, Infinity]", infinity=True) == [1.5, float("inf")]
