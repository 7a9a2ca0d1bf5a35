"""Settings at random: a configuration that fits, or exit code 2 with one line that names the setting.

Hypothesis draws over the schema itself, so a new field is covered the day it is written.
"""

import dataclasses
import math
import string
import subprocess
import sys
import typing
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.config.command_line import load_config
from grpo.config.settings import Config, scales_advantages
from grpo.errors import UserError
from tests.support.launcher import PROJECT, environment

KINDS = typing.get_type_hints(Config)
BASE = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}}
COUNTS = {"wrong value": [0, 0, 0], "unknown key": [0, 0, 0], "text of a file": [0, 0, 0], "command line": [0, 0, 0]}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**80),
    st.integers(-(2**70), -1),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -0.0, 10**400, "", " ", "null", "nan", "1e999", "\ud800"]),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers()),
)


def outcome(kind, argv):
    """Count and check one attempt. Returns the error's text, or None when the settings fit."""
    row = COUNTS[kind]
    row[0] += 1
    try:
        cfg, _ = load_config(argv)
    except UserError as error:
        row[1] += 1
        text = str(error)
        assert error.code == 2 and "\n" not in text and "\r" not in text and len(text) < 1000, text
        return text
    row[2] += 1
    for name, value in vars(cfg).items():  # what was let pass is what the schema says
        assert not isinstance(value, float) or math.isfinite(value), (name, value)
        assert value is not None or type(None) in typing.get_args(KINDS[name]), name
        if typing.get_origin(KINDS[name]) is Literal:
            assert value in typing.get_args(KINDS[name]), (name, value)
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    yield tmp_path_factory.mktemp("config") / "c.yaml"
    print(f"\n{'kind':20}{'tried':>7}{'refused':>9}{'valid':>7}{'other':>7}")
    for kind, (tried, refused, valid) in COUNTS.items():
        print(f"{kind:20}{tried:7}{refused:9}{valid:7}{0:7}")


def searching(examples):
    """So many examples, the same each time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


TIERS = [40, pytest.param(500, marks=pytest.mark.full)]


@pytest.mark.parametrize("examples", TIERS)
def test_wrong_values_in_a_file(file, examples):
    """Any field, any value: refused by name, or of the field's type."""

    @searching(examples)
    @given(st.sampled_from(sorted(KINDS)), JUNK)
    def attempt(name, value):
        with open(file, "w", encoding="utf-8", errors="surrogatepass") as out:
            yaml.safe_dump({**BASE, name: value}, out)
        text = outcome("wrong value", ["--config", str(file)])
        assert text is None or name in text or "line" in text or "digits" in text, (name, value, text)

    attempt()


@pytest.mark.parametrize("examples", TIERS)
def test_wrong_values_on_the_command_line(examples):
    @searching(examples)
    @given(st.sampled_from(sorted(KINDS)), JUNK, st.booleans())
    def attempt(name, value, joined):
        words = [f"--{name}={value}"] if joined else [f"--{name}", str(value)]
        base = ["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1}']
        text = outcome("command line", [*base, *words])
        assert text is None or name in text or "no setting" in text or "unknown setting" in text, (words, text)

    attempt()


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.full)])
def test_unknown_and_misspelt_keys(file, examples):
    """Never taken for another setting; the nearest name is offered."""

    @searching(examples)
    @given(st.sampled_from(sorted(KINDS)), st.sampled_from(string.ascii_lowercase + "_-. "), st.data())
    def attempt(name, letter, data):
        at = data.draw(st.integers(0, len(name)))
        key = name[:at] + letter + name[at + data.draw(st.integers(0, 1)) :]
        if key.split(".")[0] in KINDS:
            return
        file.write_text(yaml.safe_dump({**BASE, key: 1}))
        text = outcome("unknown key", ["--config", str(file)])
        assert text is not None and (key.strip() in text or "unknown setting" in text), (key, text)

    attempt()
    file.write_text("num_generation: 8\n")
    assert "did you mean num_generations?" in outcome("unknown key", ["--config", str(file)])
    assert outcome("command line", ["--mod", "m"]), "an abbreviation is a slip"


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.full)])
def test_files_of_any_text(file, examples):
    """Mutations of a good file, and text from nowhere."""
    good = (PROJECT / "configs" / "gsm8k.yaml").read_bytes()

    @searching(examples)
    @given(st.integers(0, len(good) - 1), st.binary(max_size=12), st.integers(0, 12))
    def attempt(at, inserted, dropped):
        file.write_bytes(good[:at] + inserted + good[at + dropped :])
        outcome("text of a file", ["--config", str(file)])

    attempt()


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + "".join(f"d{i}: [*c, *c, *c]\n" for i in range(50))
ODD_FILES = {
    "the same key twice": ("lr: 1e-6\nlr: 1e-5\n", "'lr' is set twice"),
    "the same reward twice": ("rewards: {mark_reward: 1, mark_reward: 2}\n", "'mark_reward' is set twice"),
    "a tab": ("\tlr: 1\n", "cannot start any token"),
    "a list": ("- lr\n", "expected settings"),
    "a number": ("17\n", "expected settings"),
    "references": ("lr: &x 1\nbeta: *x\n", "references"),
    "an anchor bomb": (LAUGHS, "unknown setting 'a'"),
    "an anchor bomb in a setting": ("rewards: &a {x: 1}\ninference_questions: [*a, *a]\n", "references"),
    "a tagged object": ("lr: !!python/object/apply:os.system ['touch CANARY']\n", "tags are not read"),
    "a tagged name": ("model: !!python/name:os.system\n", "tags are not read"),
    "a tagged key": ("!!python/object/apply:os.system ['touch CANARY']: 1\n", "tags are not read"),
    "a class": ("model: {class_path: os.system, init_args: {command: touch CANARY}}\n", "model"),
    "depth": ("rewards: " + "[" * 5000 + "\n", "nested too deeply"),
    "two documents": ("lr: 1\n---\nlr: 2\n", "document"),
    "another file": ("config: other.yaml\n", "unknown setting 'config'"),
    "a merge": ("<<: {lr: 1}\n", "unknown setting '<<'"),
    "a key that is a list": ("? [a]\n: 1\n", "a key must be a name"),
    "a huge number": ("lr: " + "9" * 400 + "\n", "400 digits"),
    "too many digits": ("seed: " + "9" * 5000 + "\n", "5000 digits"),
    "null for a number": ("lr: null\n", "lr: must be a number, got null"),
    "null for a choice": ("backend: null\n", "one of single, ddp, deepspeed"),
    "a NUL": ('model: "a\\0b"\n', "model: must be text in UTF-8 without NUL"),
    "an empty name": ("model: ''\n", "model: must not be empty"),
    "a run elsewhere": ("run_name: ../../x\n", "must be a name below runs_dir"),
    "too large": ("#" * 300_000, "more than 262144 bytes"),
    "UTF-16": ("lr: 1\n".encode("utf-16"), "utf-8"),
    "a control character": ("lr: \x01\n", "cannot be read"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files(file, tmp_path, name):
    content, said = ODD_FILES[name]
    if isinstance(content, str):
        content = content.replace("CANARY", str(tmp_path / "canary")).encode()
    file.write_bytes(content)
    others = [] if b"model" in content else ["--model", "m"]
    text = outcome("text of a file", ["--config", str(file), *others, "--data", "d"])
    assert text is not None and said in text, text
    assert not (tmp_path / "canary").exists()


def test_json_is_yaml(file):
    """The control: a JSON object of good settings is read as it is."""
    file.write_text('{"model": "m", "data": "d", "rewards": {"mark_reward": 1}, "lr": 0.5}')
    cfg, _ = load_config(["--config", str(file)])
    assert cfg.lr == 0.5 and dataclasses.asdict(cfg)["rewards"] == {"mark_reward": 1.0}


@pytest.mark.parametrize("argv", [["--lrr", "1"], ["--batch_size", "0"], ["--config", "no.yaml"], ["--lr", "9" * 400]])
def test_the_script_refuses_before_it_imports_torch(argv, tmp_path):
    """Without torch at all: an import of it would fail. The control: good settings do reach that import."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    start = {"cwd": tmp_path, "env": {**environment(), "PYTHONPATH": f"{tmp_path}:{PROJECT}"}, "capture_output": True}
    done = subprocess.run([sys.executable, str(PROJECT / "train.py"), *argv], text=True, timeout=120, **start)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and "torch was imported" not in done.stderr
    good = subprocess.run([sys.executable, str(PROJECT / "train.py")], text=True, timeout=120, **start)
    assert "torch was imported" in good.stderr


@pytest.mark.parametrize(
    "given, held",
    [("true", "group"), ("false", "none"), ("group", "group"), ("none", "none"), ("off", "none")],
)
def test_scale_rewards_has_two_names_for_each_value_and_one_form(tmp_path, capsys, given, held):
    """On the command line, in a file, in what --print_config prints and in a Config made by hand."""
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\ndata: d\nrewards: {{mark_reward: 1}}\nscale_rewards: {given}\n")
    from_file, _ = load_config(["--config", str(file)])
    from_words, _ = load_config(
        ["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1}', "--scale_rewards", given]
    )
    by_hand = Config(scale_rewards={"true": True, "false": False}.get(given, held))
    assert from_file.scale_rewards == from_words.scale_rewards == by_hand.scale_rewards == held
    assert scales_advantages(from_file) is (held == "group")
    with pytest.raises(SystemExit) as ended:
        load_config(["--config", str(file), "--print_config"])
    line = f"\nscale_rewards: {held}" + (f"  # {file}" if held != "group" else "") + "\n"
    assert ended.value.code == 0 and line in capsys.readouterr().out


@pytest.mark.parametrize("given", ["1", "null", "maybe", "[group]"])
def test_scale_rewards_takes_nothing_else(given):
    with pytest.raises(UserError, match=r"^scale_rewards: must be one of group, batch, none, or true or false, got"):
        load_config(["--config", "configs/demo.yaml", "--scale_rewards", given])
