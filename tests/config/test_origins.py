"""`--print_config` says where each value came from, and stays a configuration file that gives the same run."""

import pytest
import yaml

from grpo.config.command_line import load_config, load_sft_config
from grpo.config.settings import Config

FILE = """\
model: m
data: d
rewards: {mark_reward: 1, b_reward: 0.5}
algorithm: dapo
clip_eps: 0.1
lr: 1.0e-6
stop: ["a", "b\\n"]
system_prompt: |
  a # b
  c: d
sft:
  epoch: 7
  solution_column: answer
"""
LONG = "a very long text that the writer of YAML folds, because it has more than eighty characters, and a # sign"


def printed(capsys, argv, load=load_config):
    with pytest.raises(SystemExit) as ended:
        load([*argv, "--print_config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def origins(text):
    """Setting -> its comment. A comment stands on a value's last line, so its setting is the last key before."""
    found, name = {}, ""
    for line in text.splitlines():
        head = line.partition(":")[0]
        name = head if head.isidentifier() else name
        if "  # " in line:
            found[name] = line.rpartition("  # ")[2]
    return found


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(FILE)
    return "run.yaml"


def test_each_value_that_is_no_default_has_its_origin(file, capsys):
    text = printed(capsys, ["--config", file, "--seed=7", "--clip_eps_high", "0.3", "--data_config", LONG])
    assert origins(text) == {
        **dict.fromkeys(["model", "data", "rewards", "algorithm", "clip_eps", "stop", "system_prompt", "sft"], file),
        **dict.fromkeys(["seed", "clip_eps_high", "data_config"], "command line"),
        **dict.fromkeys(["weighting", "filter_groups"], "algorithm: dapo"),
    }
    assert "\nlr: 1.0e-06\n" in text, "a file's value that is the default needs no comment"


def test_what_is_printed_is_a_file_that_gives_the_same(file, capsys, tmp_path):
    argv = ["--config", file, "--data_config", LONG, "--run_name", "r", "--stop", '["x # y"]']
    text = printed(capsys, argv)
    assert yaml.safe_load(text)["system_prompt"] == "a # b\nc: d\n" and yaml.safe_load(text)["data_config"] == LONG
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(["--config", "again.yaml"])[0] == load_config(argv)[0]
    assert yaml.safe_load(printed(capsys, ["--config", "again.yaml"])) == yaml.safe_load(text)
    assert set(yaml.safe_load(text)) == set(vars(Config()))


def test_a_part_of_a_mapping_names_both(file, capsys):
    text = printed(capsys, ["--config", file, "--rewards.b_reward", "2"])
    assert origins(text)["rewards"] == "run.yaml, command line"


def test_the_last_file_wins_and_an_old_name_is_shown_as_the_new_one(file, capsys, tmp_path):
    (tmp_path / "b.yaml").write_text("loss: dr_grpo\nclip_eps: 0.15\n")
    text = printed(capsys, ["--config", file, "--config", "b.yaml", "--algorithm", "null"])
    found = origins(text)
    assert found["weighting"] == found["clip_eps"] == "b.yaml" and found["model"] == file
    assert yaml.safe_load(text)["weighting"] == "dr_grpo" and "\nloss:" not in text


def test_the_stage_before_names_its_section(file, capsys):
    found = origins(printed(capsys, ["--config", file, "--lr", "1e-3"], load_sft_config))
    assert found["epoch"] == found["solution_column"] == "run.yaml, sft" and found["lr"] == "command line"
    assert found["model"] == file and found["output_dir"] == "default with _sft" and "seed" not in found


def test_a_file_of_the_project_is_named_from_there_and_a_strange_name_stays_one_line(file, capsys, tmp_path):
    assert origins(printed(capsys, []))["model"] == "configs/demo.yaml"
    strange = tmp_path / "a\nb: c.yaml"
    strange.write_text(FILE)
    text = printed(capsys, ["--config", str(strange)])
    assert yaml.safe_load(text)["model"] == "m" and origins(text)["model"] == "a?b: c.yaml"
