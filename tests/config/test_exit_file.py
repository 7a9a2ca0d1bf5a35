"""exit.json after settings that were refused: in the run's own folder, with the code and the reason."""

import json

import pytest

from grpo.config.exit_file import output_dir_of
from tests.support.launcher import run_script


def note(folder):
    return json.loads((folder / "exit.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", [["--lr", "-1"], ["--lr", "abc"], ["--no_such_setting", "1"]])
def test_a_refused_setting_replaces_an_earlier_runs_code(tmp_path, words):
    (tmp_path / "exit.json").write_text('{"code": 0, "reason": "done"}')
    done = run_script("train.py", "--output_dir", str(tmp_path), *words)
    assert done.returncode == 2
    assert note(tmp_path)["code"] == 2 and done.stderr == f"error: {note(tmp_path)['reason']}\n"


def test_the_folder_of_a_file_and_of_the_supervised_stage(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("output_dir: w/out\nlr: abc\nsft: {epoch: 1}\n")
    argv = ["--config", str(file)]
    assert [str(output_dir_of(argv, sft)) for sft in (False, True)] == ["w/out", "w/out_sft"]
    file.write_text("output_dir: w/out\nsft: {output_dir: w/own}\n")
    assert str(output_dir_of(argv, True)) == "w/own"
    for broken in ("a: [", "- 1", "", "output_dir: 3"):
        file.write_text(broken)
        assert str(output_dir_of(argv)) == "output"
    assert str(output_dir_of([*argv, "--output_dir", "x"])) == "x"


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_file_without_settings_is_named(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    done = run_script("train.py", "--config", str(tmp_path / "empty.yaml"), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.endswith("empty.yaml holds no settings. Give lines such as `lr: 1.0e-6`.\n")
