"""A value that does not fit its setting is one line: name, what was given and where, what is allowed, what to do."""

import argparse
import re
import typing

import pytest

import inference
from grpo.config.checks import in_words
from grpo.config.command_line import load_config, load_sft_config
from grpo.config.messages import OneLineParser
from grpo.config.settings import Config
from grpo.config.sft_section import OWN
from grpo.errors import UserError
from grpo.evaluate import command as evaluate
from grpo.export import command as export
from grpo.plan import command as plan

BASE = {"model": "m", "data": "d", "rewards": "{r: 1.0}"}
PARSERS_WORDS = re.compile(r"Parser key|<class|typing\.|Subtypes|usage:|Expected a|NoneType|invalid \w+ value")
TRACKERS = "tensorboard, wandb, swanlab, trackio"
REPORT = f"report_to: must be one of {TRACKERS}, none, or a list of {TRACKERS}, got "
VALUES = {  # setting, value as written, the line but for where it was given and "(see …)"
    "a missing space": ("rewards", "{a:1}", "must be a mapping from names to numbers, got '{a:1}'", "write {a: 1}"),
    "a path": ("rewards", "{r.py:f:1}", "must be a mapping from names to numbers, got", "write {r.py:f: 1}"),
    "two of them": ("rewards", "{a:1, b:2.5}", "must be a mapping", "write {a: 1, b: 2.5}"),
    "a nested one": ("reward_parameters", "{r:{a:1}}", "must be a mapping from names to mappings", "write {r: {a: 1}}"),
    "names": ("column_names", "{a:b}", "must be a mapping from names to names, got '{a:b}'", "write {a: b}"),
    "a section": ("sft", "{lr:1}", "must be a mapping from names to values, got '{lr:1}'", "write {lr: 1}"),
    "a weight": ("rewards", "{a: x}", "must be a mapping from names to numbers", "a has 'x', must be a number"),
    "no mapping": ("rewards", "a", "must be a mapping from names to numbers, got 'a'", "Write {name: value}"),
    "an unknown tracker": ("report_to", "mlflow", REPORT.partition(": ")[2] + "'mlflow'", "mlflow is none of them"),
    "one of two": ("report_to", "[wandb, mlflow]", "got '[wandb, mlflow]'", "mlflow is none of them"),
    "a slip": ("report_to", "wandbb", "got 'wandbb'", "Did you mean wandb?"),
    "a number": ("lr", "abc", "must be a number, got 'abc'", ""),
    "a comma": ("lr", "1,5", "must be a number, got '1,5'", "Write 1.5"),
    "a share": ("eval_split_size", "5%", "must be a number, got '5%'", "Write 0.05"),
    "not finite": ("temperature", "nan", "must be a number, got 'nan'", "It must be finite"),
    "a whole number": ("epoch", "1.5", "must be a whole number, got '1.5'", ""),
    "an exponent": ("seed", "1e3", "must be a whole number, got '1e3'", "Write 1000"),
    "a truth value": ("deterministic", "maybe", "must be true or false, got 'maybe'", ""),
    "one or null": ("chat_template", "qwen", "must be true, false or null, got 'qwen'", ""),
    "a number or null": ("max_steps", "many", "must be a whole number or null, got 'many'", ""),
    "a choice": ("dtype", "fp16", "must be one of fp32, bf16, got 'fp16'", "Did you mean bf16?"),
    "a number of few": ("zero_stage", "5", "must be one of 0, 1, 2, 3, got '5'", ""),
    "an old name": ("loss", "x", "must be one of grpo, dapo, dr_grpo, got 'x'", ""),
    "a file alone": ("weighting", "my.py", "must be one of grpo, dapo, dr_grpo, got 'my.py'", "Write my.py:FUNCTION"),
    "a slip in a name": (
        "surrogate",
        "cspo",
        "must be one of ppo_clip, cispo, sapo, gmpo, reinforce",
        "Did you mean cispo?",
    ),
    "one name": ("group_filter", "all", "must be one of zero_variance, got 'all'", ""),
    "a list": ("lora_target_modules", "q_proj,v_proj", "must be all-linear or a list of texts", "[q_proj, v_proj]"),
    "a list of numbers": ("inference_questions", "[1]", "must be a list of texts, got '[1]'", "in quotes"),
}


def line_of(load, argv):
    with pytest.raises(UserError) as caught:
        load(argv)
    text = str(caught.value)
    assert caught.value.code == 2 and "\n" not in text and not PARSERS_WORDS.search(text), text
    return text


@pytest.mark.parametrize("name", VALUES)
def test_a_value_on_the_command_line_and_in_a_file(tmp_path, name):
    setting, value, allowed, advice = VALUES[name]
    rest = {key: one for key, one in BASE.items() if key != setting}
    words = [word for key, one in rest.items() for word in (f"--{key}", one)]
    for written in ([f"--{setting}", value], [f"--{setting}={value}"]):
        text = line_of(load_config, [*words, *written])
        assert text.startswith(f"{setting}: must be ") and allowed in text and advice in text
        assert text.endswith("(see train.py --help).")
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{key}: {one}\n" for key, one in rest.items()) + f"{setting}: {value}\n")
    if name == "a nested one":  # `r:{` is no YAML inside of braces
        assert f"config: {file}, line 4: this is no YAML" in line_of(load_config, ["--config", str(file)])
        return
    if name == "a section":
        assert "sft: a space is missing after the colon in 'lr:1'" in line_of(load_config, ["--config", str(file)])
        return
    text = line_of(load_config, ["--config", str(file)])
    assert text.startswith(f"{setting}: must be ") and f" ({file}, line {len(rest) + 1})" in text and advice in text


@pytest.mark.parametrize("name", [n for n, kind in typing.get_type_hints(Config).items() if n not in ("sft",)])
def test_every_setting_says_what_it_takes(name):
    """A mapping fits only mappings, and a number fits none of those."""
    kind = typing.get_type_hints(Config)[name]
    value = "7.5" if typing.get_origin(kind) is dict else "{a: 1}"
    if kind in (str, str | None, str | list[str] | None):
        return  # any text fits on the command line
    words = [word for key, one in BASE.items() if key != name for word in (f"--{key}", one)]
    assert line_of(load_config, [*words, f"--{name}", value]).startswith(f"{name}: must be {in_words(kind)}, got ")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--lr"], "lr: no value given, must be a number. Write --lr VALUE"),
        (["--deterministic", "--lr", "1"], "deterministic: no value given, must be true or false."),
        (["--rewards.a", "abc"], "rewards.a: must be a number, got 'abc'"),
        (["--lrr", "1"], "unknown setting '--lrr'; did you mean --lr?"),
        (["--batch-size", "3"], "unknown setting '--batch-size'; did you mean --batch_size?"),
        (["-lr", "3"], "unknown setting '-lr'; did you mean --lr?"),
        (["extra"], "'extra' belongs to no setting. Write --name value"),
        (["--lr", "abc\n\x1b[31m"], r"lr: must be a number, got 'abc\n\x1b[31m'"),
    ],
)
def test_words_that_are_no_value(argv, said):
    assert said in line_of(load_config, ["--model", "m", "--data", "d", "--rewards", "{r: 1.0}", *argv])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--packing", "maybe"], "packing: must be true or false, got 'maybe' (see python -m grpo.sft --help)."),
        (["--loss_on", "most"], "loss_on: must be one of completion, all, got 'most'"),
        (["--solution_remove", "x"], "solution_remove: must be a list of texts, got 'x'. Write [x]"),
        (["--lr", "abc"], "lr: must be a number, got 'abc'"),
        (["--sft", "{a: 1}"], "unknown setting '--sft' (see"),
    ],
)
def test_the_supervised_stage(argv, said):
    assert said in line_of(load_sft_config, ["--model", "m", "--data", "d", "--solution_column", "s", *argv])


@pytest.mark.parametrize("name", OWN)
def test_the_section_of_the_supervised_stage(tmp_path, name):
    value = "{a: 1}"
    file = tmp_path / "c.yaml"
    file.write_text(
        "".join(f"{k}: {v}\n" for k, v in BASE.items()) + f"sft:\n  solution_column: s\n  {name}: {value}\n"
    )
    if name == "solution_column":
        file.write_text("".join(f"{k}: {v}\n" for k, v in BASE.items()) + f"sft:\n  {name}: {value}\n")
    text = line_of(load_config, ["--config", str(file)])
    assert text.startswith(f"sft: {name}: must be {in_words(OWN[name])}, got {{'a': 1}}")


OTHERS = [
    (inference.parse, ["--seed", "abc", "hi"], "seed: must be a whole number, got 'abc' (see"),
    (inference.parse, ["--device", "gpu", "hi"], "device: must be one of auto, cpu, cuda, got 'gpu'"),
    (inference.parse, ["--temperature"], "temperature: no value given. Write --temperature VALUE"),
    (inference.parse, ["--sede", "3", "hi"], "unknown argument '--sede'; did you mean --seed?"),
    (inference.parse, ["--max_tokens", "many", "hi"], "max_new_tokens: must be a whole number, got 'many'"),
    (evaluate.parse, ["--limit", "x"], "limit: must be a whole number, got 'x'"),
    (
        evaluate.parse,
        ["--task", "numbers"],
        "task: must be one of auto, number, choice, text, got 'numbers'; did you mean",
    ),
    (evaluate.parse, ["--compare", "a"], "compare: "),
    (evaluate.parse, ["more"], "'more' belongs to no argument."),
    (export.parse, ["--to", "gguf"], "out: missing, it must be given (see python -m grpo.export --help)."),
    (export.parse, ["--out", "x", "--dtype", "fp32"], "dtype: must be one of bf16, f16, got 'fp32'"),
    (export.parse, ["--out", "x", "--dry_run=1"], "dry_run: "),
]


@pytest.mark.parametrize("parse, argv, said", OTHERS)
def test_other_commands(parse, argv, said):
    assert said in line_of(parse, argv)


def test_the_plan(capsys):
    assert plan.main(["--gpus", "many", "--model", "m"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: gpus: must be ") and text.count("\n") == 1 and "usage" not in text


def test_control_argparse_alone_prints_its_usage(capsys):
    parser = argparse.ArgumentParser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--x"])
    assert "usage:" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown argument '--x'"):
        OneLineParser(prog="p").parse_args(["--x"])


@pytest.mark.parametrize(
    "words, said",
    [
        ("--data.train_batch_size 3", "unknown setting '--data.train_batch_size': data takes text or null"),
        ("--model.path x/y", "unknown setting '--model.path': model takes text or null"),
        ("--lr.x=3", "unknown setting '--lr.x': lr takes a number"),
        ("--stop.x 3", "unknown setting '--stop.x': stop takes a list of texts"),
        ("--num-generations 4", "unknown setting '--num-generations'; did you mean --num_generations?"),
        ("--learning-rate 4", "TRL's name, here it is lr"),
        ("--eval_data [a.jsonl,b.jsonl]", "eval_data: must be a mapping"),
    ],
)
def test_parts_of_settings_that_have_none_and_dashes(words, said):
    line = line_of(
        load_config, [*(word for name, value in BASE.items() for word in (f"--{name}", value)), *words.split()]
    )
    assert said in line


def test_several_sets_as_a_list(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nrewards: {r: 1.0}\neval_data: [a.jsonl, b.jsonl]\n")
    assert "Write {name: file, …}" in line_of(load_config, ["--config", str(file)])


@pytest.mark.parametrize(
    "value, kept", [(r"[\n\n]", None), (r'["\n\n"]', ["\n\n"]), (r"[\nu]", [r"\nu"]), (r"['\n']", None)]
)
def test_a_line_break_in_stop(value, kept):
    argv = [*(word for name, text in BASE.items() for word in (f"--{name}", text)), "--stop", value]
    if kept is None:
        assert "a backslash, which YAML reads only in double quotes" in line_of(load_config, argv)
    else:
        assert load_config(argv)[0].stop == kept
