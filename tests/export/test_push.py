"""Sending an export to a hub: a server on this machine that records what it is sent, and answers as hubs do."""

import json
import logging
import shutil
import socket
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from grpo.checkpoints import card
from grpo.checkpoints.manifest import write_manifest
from grpo.export.command import main
from grpo.models import upload
from tests.support.accepting_hub import TOKEN, accepting_hub, sent
from tests.support.taught import taught_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    settings = [
        "--max_prompt_length",
        "96",
        "--max_generate_length",
        "64",
        "--model",
        "/home/mia/secret/base",
        "--data",
        "/home/mia/secret/q.jsonl",
    ]
    return taught_checkpoint(tmp_path_factory.mktemp("taught") / "checkpoint_3", [("2+2?", {}, "4")], settings)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main(["--checkpoint", str(checkpoint), "--to", "merged_16bit", "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    with accepting_hub() as server:
        online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server


def online(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("words", [[], ["--public"]])
def test_an_export_arrives_whole_in_one_commit(server, out, capsys, words):
    assert main(["--out", str(out), "--push", "mia/tiny", *words]) == 0
    assert sent(server) == content(out) and "model.safetensors" in content(out)
    [created] = [json.loads(body) for path, _, body in server.seen if path == "/api/repos/create"]
    public = bool(words)
    assert created["name"] == "tiny" and created["organization"] == "mia"
    assert created.get("private", created.get("visibility") == "private") is not public
    assert {key for _, key, _ in server.seen} == {f"Bearer {TOKEN}"}
    shown = capsys.readouterr()
    assert f"sent {len(content(out))} files" in shown.out and TOKEN not in shown.out + shown.err


@pytest.fixture(scope="module")
def several(checkpoint, tmp_path_factory) -> Path:
    """An export of two forms: a folder for each, one card above them."""
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("several") / "out"
    assert main(["--checkpoint", str(checkpoint), "--to", "merged_16bit,gguf", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("form, library", [("merged_16bit", "transformers"), ("gguf", "gguf")])
def test_a_folder_of_an_export_of_several_forms_is_sent_with_its_card(
    server, several, tmp_path, monkeypatch, form, library
):
    out = Path(shutil.copytree(several, tmp_path / "out"))
    whole = (out / "README.md").read_text()
    (out / "README.md").write_text(whole + "\nEdited by hand.\n")
    before = content(out)
    monkeypatch.chdir(out / form)
    assert main(["--out", ".", "--push", "mia/tiny"]) == 0
    assert content(out) == before
    files = sent(server)
    card_text = files.pop("README.md").decode()
    assert files == content(out / form) and len(files) > 1
    header = yaml.safe_load(card_text.split("---\n")[1])
    assert header["library_name"] == library and ("gguf" in header["tags"]) == (form == "gguf")
    assert f"Formats here: {form}." in card_text and "Edited by hand." in card_text
    assert card_text.split("## Data")[1] == (out / "README.md").read_text().split("## Data")[1]


def test_a_folder_of_several_forms_keeps_a_card_of_its_own_and_is_checked(server, several, tmp_path, capsys):
    out = Path(shutil.copytree(several, tmp_path / "out"))
    (out / "gguf" / "README.md").write_text("mine")
    assert main(["--out", str(out / "gguf"), "--push", "mia/tiny", "--dry_run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("mine")
    (out / "gguf" / "model-f16.gguf").write_bytes(b"damaged")
    assert main(["--out", str(out / "gguf"), "--push", "mia/tiny"]) == 2
    assert "model-f16.gguf is not as it was written" in capsys.readouterr().err and not server.seen


def test_a_card_beside_a_folder_that_is_no_part_of_it_is_not_taken(server, out, tmp_path):
    (out / "README.md").unlink()
    (tmp_path / "README.md").write_text("of something else")
    write_manifest(tmp_path / "out", 3)
    assert main(["--out", str(out), "--push", "mia/tiny"]) == 0
    assert "README.md" not in sent(server)


@pytest.mark.parametrize(
    "base, expected", [("/home/mia/base", "a folder of this machine"), ("mia/base", "sent 2 files")]
)
def test_an_adapter_of_a_local_base_is_not_sent(server, tmp_path, capsys, base, expected):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    write_manifest(tmp_path, 1)
    assert main(["--out", str(tmp_path), "--push", "mia/tiny"]) == (2 if base.startswith("/") else 0)
    shown = capsys.readouterr()
    assert expected in shown.out + shown.err
    assert bool(server.seen) is not base.startswith("/")


def test_an_adapter_of_a_folder_named_like_a_hub_model_is_not_sent(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mia" / "base").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "mia/base"}))
    write_manifest(tmp_path / "out", 1)
    for words in ([], ["--dry_run"]):
        assert main(["--out", "out", "--push", "mia/tiny", *words]) == 2
        assert "names 'mia/base' as its base, a folder of this machine" in capsys.readouterr().err
    assert not server.seen


@pytest.mark.parametrize("words", [[], ["--dry_run"]])
def test_a_checkpoint_is_no_export_and_its_optimizer_state_is_not_sent(server, tmp_path, capsys, words):
    folder = tmp_path / "checkpoint_3"
    (folder / "trainer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "trainer" / "optimizer-00001-of-00002.safetensors").write_bytes(b"moments")
    write_manifest(folder, 3)
    assert main(["--out", str(folder), "--push", "mia/tiny", *words]) == 2
    shown = capsys.readouterr()
    assert not server.seen and not shown.out
    assert "checkpoint_3 is a checkpoint of a run" in shown.err and "--to merged_16bit" in shown.err


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("at", ["/api/repos/create", "/preupload/", "/commit/"])
def test_refusals_leave_the_export_and_never_show_the_token(server, out, capfd, caplog, monkeypatch, status, at):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    caplog.set_level(logging.DEBUG)
    server.refuse[at] = status
    before = content(out)
    assert main(["--out", str(out), "--push", "mia/tiny"]) == 2
    shown = capfd.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: push: mia/tiny refused, or not reached: ") and str(status) in last
    assert f"python -m grpo.export --out {out} --push mia/tiny" in last
    assert TOKEN not in shown.out + shown.err + caplog.text
    assert content(out) == before


def test_an_error_that_holds_the_token_is_shown_without_it(server, out, capfd, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"header 'Bearer {TOKEN}' is refused\nmore of {TOKEN}")

    monkeypatch.setattr(upload.HfApi, "create_repo", fail)
    assert main(["--out", str(out), "--push", "mia/tiny"]) == 2
    shown = capfd.readouterr()
    assert "header 'Bearer ***' is refused" in shown.err and TOKEN not in shown.out + shown.err


def test_a_server_that_is_not_there(out, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    before = content(out)
    assert main(["--out", str(out), "--push", "mia/tiny"]) == 2
    assert "not reached" in capfd.readouterr().err and content(out) == before


def test_a_refusal_after_an_export_leaves_it(server, checkpoint, tmp_path, capsys):
    server.refuse["/api/repos/create"] = 403
    words = ["--checkpoint", str(checkpoint), "--to", "merged_16bit", "--out", str(tmp_path / "new")]
    assert main([*words, "--push", "mia/tiny"]) == 2
    assert "403" in capsys.readouterr().err
    server.refuse.clear()
    assert main(["--out", str(tmp_path / "new"), "--push", "mia/tiny"]) == 0
    assert sent(server) == content(tmp_path / "new")


def test_without_a_token_nothing_is_begun(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(upload, "get_token", lambda: None)
    words = ["--checkpoint", str(checkpoint), "--to", "merged_16bit", "--out", str(tmp_path / "new")]
    assert main([*words, "--push", "mia/tiny"]) == 2
    assert "no token. Set HF_TOKEN" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_files_and_card_and_sends_nothing(server, out, capsys, monkeypatch):
    monkeypatch.setattr(upload, "get_token", lambda: pytest.fail("not needed"))
    assert main(["--out", str(out), "--push", "mia/tiny", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in content(out)) and (out / "README.md").read_text() in shown
    assert server.seen == []


def test_only_what_the_export_wrote_is_sent_and_only_as_it_was(server, out, capsys):
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("my own card")
    assert main(["--out", str(out), "--push", "mia/tiny"]) == 0
    assert "notes.txt" not in sent(server) and sent(server)["README.md"] == b"my own card"
    count = len(server.seen)
    for damage in ("changed", "link", "gone"):
        (out / "tokenizer.json").unlink()
        if damage == "changed":
            (out / "tokenizer.json").write_text("{}")
        elif damage == "link":
            (out / "tokenizer.json").symlink_to("/etc/hostname")
        assert main(["--out", str(out), "--push", "mia/tiny"]) == 2
        assert "tokenizer.json" in capsys.readouterr().err
        (out / "tokenizer.json").unlink(missing_ok=True)
        (out / "tokenizer.json").write_text("{}")
    assert len(server.seen) == count


def test_paths_of_this_machine_stay_here(out):
    for name, text in content(out).items():
        assert b"/home/mia" not in text, name
    assert json.loads(content(out)["trainer/state.json"])["config"]["data"] == "q.jsonl"


# --- the card


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_base_data_rewards_curve_metrics_and_config(tmp_path):
    lines = [{"step": step, "reward/mean": step / 100, "completions/length_mean": 7.5} for step in range(1, 61)]
    lines += [
        {"step": 20, "eval/accuracy": 0.25},
        {"step": 40, "eval/accuracy": 0.5, "eval/length_mean": 9.0},
        {"step": 60, "eval/accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = {"model": "Qwen/Qwen2.5-0.5B", "data": "openai/gsm8k", "rewards": {"right": 1.0, "form": 0.5}, "lr": 1e-6}
    found = card.read_metrics(config, 40, tmp_path / "metrics.jsonl")
    text = card.card_text(config, 40, ["merged_16bit", "gguf"], found)
    assert front(text)["base_model"] == "Qwen/Qwen2.5-0.5B" and front(text)["datasets"] == ["openai/gsm8k"]
    assert "| `form` | `0.5` |" in text and "| `lr` | `1e-06` |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 40 |", "| 41 |", "| 60 |"))]
    assert rows == ["| 1 | 0.01 | 7.5 |", "| 40 | 0.4 | 7.5 |"]  # nothing from after the checkpoint
    assert "At step 40:" in text and "| `eval/accuracy` | 0.5 |" in text


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "`` ` ``` code",
    "a | b | c",
    "<script>alert(1)</script>",
    "[click](http://evil)",
    "![i](http://evil/p.png)",
    "\u202eright to left",
    "\x1b[31mred",
    "x" * 5000,
    "`",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_names(text):
    config = {"model": text, "data": text, "run_name": text, "rewards": {text: 1.0}, "system_prompt": text, text: text}
    shown = card.card_text(config, 40, ["gguf"], [])
    assert front(shown).keys() == {"library_name", "pipeline_tag", "tags"}
    assert shown.count("\n---\n") == 1
    tables = [line for line in shown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {3}
    assert all(char.isprintable() or char == "\n" for char in shown) and max(map(len, shown.splitlines())) < 1000
    for span in (card.code(text), card.code(config)):
        fence = span[: len(span) - len(span.lstrip("`"))]
        assert span.endswith(fence) and fence not in span[len(fence) : -len(fence)].replace("`" * (len(fence) + 1), "")
        assert "\n" not in span


@pytest.mark.parametrize("line", ["{", "[]", '{"step": true}', '{"loss": 1}', "[" * 100000])
def test_a_metrics_file_that_is_none_is_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "reward/mean": 1.0}}\n{line}\n')
    with pytest.raises(card.UserError, match=r"metrics: .* cannot be read"):
        card.read_metrics({}, 40, tmp_path / "metrics.jsonl")


def test_the_token_is_no_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--token" not in capsys.readouterr().out and TOKEN not in " ".join(sys.argv)
