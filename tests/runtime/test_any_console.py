"""A console that is not UTF-8 ends no run: characters it lacks are shown as escapes; files are UTF-8 in any locale."""

import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from grpo.run.console import Console, json_line
from tests.support.launcher import PROJECT, environment
from tests.support.tiny import save_tiny

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0"}  # neither names nor arguments nor the console are UTF-8
TEXT = "数é😀\ud800"  # the last one is half of a pair, which no encoding has


def python(*argv, env, cwd=PROJECT):
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment() | env, capture_output=True, timeout=120)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "env, encoding, shown",
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii", "\\u6570\\xe9\\U0001f600\\ud800"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1", "\\u6570é\\U0001f600\\ud800"),
        ({"PYTHONIOENCODING": "gbk"}, "gbk", "数é\\U0001f600\\ud800"),
        ({"PYTHONIOENCODING": "gb18030:strict"}, "gb18030", "数é😀\\ud800"),
        ({"PYTHONIOENCODING": "cp437"}, "cp437", "\\u6570é\\U0001f600\\ud800"),
        ({"PYTHONIOENCODING": "utf-8"}, "utf-8", "数é😀\\ud800"),
        (POSIX, "ascii", "\\u6570\\xe9\\U0001f600\\ud800"),
    ],
    ids=["ascii", "latin-1", "gbk", "gb18030", "cp437", "utf-8", "posix"],
)
def test_every_character_can_be_printed(env, encoding, shown, stream):
    """The control: without the package the same line raises on stdout, so it is the package that lets it pass."""
    line = f"import sys; print({TEXT!a}, file=sys.{stream})"
    done = python("-c", f"import grpo; {line}", env=env)
    assert done.returncode == 0 and getattr(done, stream).decode(encoding).strip() == shown, done.stderr
    if stream == "stdout":
        assert b"UnicodeEncodeError" in python("-c", line, env=env).stderr


def test_arguments_are_utf8_where_the_locale_is_not():
    """What is no UTF-8 either stays as Python read it."""
    code = "import sys; before = sys.argv[1:]; import grpo; print(ascii([before, sys.argv[1:]]))"
    done = python("-c", code, "数😀", b"\xff", "plain", env=POSIX)
    before, after = ast.literal_eval(done.stdout.decode())
    assert before != after and after == ["数😀", "\udcff", "plain"]


COMMANDS = {  # ends in one line that quotes the text it was given
    "train": ["train.py", "--data", "数é😀.jsonl", "--model", "m"],
    "train config": ["train.py", "--config", "数é😀.yaml"],
    "sft": ["-m", "grpo.sft", "--config", "数é😀.yaml"],
    "plan": ["-m", "grpo.plan", "--config", "数é😀.yaml"],
    "config": ["-m", "grpo.config"],
    "launch": ["launch/torchrun.py", "--restarts", "数é😀"],
    "inference": ["inference.py", "--checkpoint", "数é😀", "数"],
    "replay": ["-m", "grpo.replay", "数é😀"],
    "export": ["-m", "grpo.export", "数é😀", "--out", "unused"],
    "evaluate": ["-m", "grpo.evaluate", "--checkpoint", "数é😀"],
}
SLOW = {"inference", "replay", "export", "evaluate", "launch"}  # they import torch first


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in COMMANDS]
)
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, POSIX], ids=["ascii", "posix"])
def test_every_command_quotes_what_it_got(command, env):
    done = python(*COMMANDS[command], env=env)
    said = done.stdout.decode("ascii") + done.stderr.decode("ascii")
    assert "Traceback" not in said, said[-2000:]
    assert done.returncode == (0 if command == "config" else 2), said[-2000:]
    if command not in ("config", "train"):
        assert "\\u6570" in said, said[-2000:]


PRINTING = {
    "plan": ["-m", "grpo.plan"],
    "config": ["-m", "grpo.config"],
    "help": ["-m", "grpo.doctor", "--help"],
    "inference": ["inference.py", "--help"],
}


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in PRINTING]
)
def test_a_reader_that_leaves_ends_a_command_in_silence(command):
    """As `| head` does. Python's own end would be a traceback, or code 120 and a line about an ignored exception."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *PRINTING[command]]
    done = subprocess.run(command, cwd=PROJECT, env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=240)
    os.close(writing)
    allowed = {128 + signal.SIGPIPE, *([0] if "--help" in command else [])}  # argparse ignores it, the flush may not
    assert done.returncode in allowed, done.stderr
    assert not re.search(b"Error|Exception|Traceback", done.stderr), done.stderr


def test_every_command_imports_the_package_that_does_it():
    """What is run by itself, beside tests, benchmarks and what made the demo: it is in grpo/, or imports from it."""
    elsewhere = {"tests", "benchmarks", "demo"}
    files = [*PROJECT.glob("*.py"), *PROJECT.glob("[a-z]*/**/*.py")]
    files = [path for path in files if not elsewhere & set(path.relative_to(PROJECT).parts)]
    started = [path for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(started) >= 10
    for path in started:
        inside = path.is_relative_to(PROJECT / "grpo")
        assert inside or re.search(r"^from grpo\.", path.read_text(encoding="utf-8"), re.M), path


def test_text_files_are_opened_as_utf8():
    """The locale's encoding is used nowhere: each call that opens a text names its own."""
    files = [*PROJECT.glob("grpo/**/*.py"), *PROJECT.glob("launch/*.py"), *PROJECT.glob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            opens = name == "open" and (isinstance(node.func, ast.Name) or any(m in ("r", "w", "a", "x") for m in mode))
            if (opens and not any("b" in str(m) for m in mode)) or name in ("read_text", "write_text"):
                found.append((str(path), node.lineno, "encoding" in {keyword.arg for keyword in node.keywords}))
    assert len(found) > 20
    assert [where for where in found if not where[2]] == []


def test_a_config_file_is_utf8_in_any_locale(tmp_path):
    """`--print_config` shows the settings as read; the escape is YAML's own."""
    (tmp_path / "c.yaml").write_text("model: m\ndata: d\nsystem_prompt: 数é😀\n", encoding="utf-8")
    done = python(str(PROJECT / "train.py"), "--config", "c.yaml", "--print_config", env=POSIX, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("ascii")
    assert re.search(r"^system_prompt: .*(\\u6570|数)", shown, re.M), shown


def test_a_folder_that_the_locale_cannot_name_is_refused(tmp_path):
    done = python(str(PROJECT / "train.py"), "--output_dir", "数", env=POSIX, cwd=tmp_path)
    assert done.returncode == 2 and b"output_dir: this locale's encoding of file names, ascii," in done.stderr


@pytest.mark.parametrize("encoding, corner", [("ascii", "+"), ("latin-1", "+"), ("gbk", "┏"), ("utf-8", "┏")])
def test_tables_have_lines_that_the_console_knows(monkeypatch, tmp_path, encoding, corner):
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    table = Table("question")
    table.add_row("数")
    with Console(True, tmp_path / "train.log") as console:
        console.show(table)
    out.flush()
    shown = written.getvalue().decode(encoding)
    assert shown[0] == corner and ("数" in shown or "\\u6570" in shown)
    assert "数" in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_json_lines_stay_json(monkeypatch, encoding):
    """Escapes of Python, such as \\xe9, are no JSON."""
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    print(json_line({"answer": "数é😀"}), flush=True)
    assert json.loads(written.getvalue().decode(encoding)) == {"answer": "数é😀"}


SETTINGS = """
model: tiny
data: d.jsonl
eval_data: d.jsonl
rewards: {"奖励.py:f_reward": 1.0}
prompt_template: "问：{question}答："
chat_template: false
console_language: zh
max_steps: 1
batch_size: 2
gradient_accumulation_steps: 1
num_generations: 2
max_prompt_length: 100
max_generate_length: 4
log_completions_steps: 1
log_samples_steps: 1
"""


@pytest.mark.full
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "gbk"}, POSIX])
def test_a_run_and_its_checkpoint_in_any_locale(tmp_path, env):
    """Whole: table, labels and data are Chinese; the files are UTF-8 whatever the console is."""
    save_tiny(tmp_path / "tiny", "qwen3")
    rows = [json.dumps({"question": f"小明😀{i}", "answer": "1"}, ensure_ascii=False) for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows), encoding="utf-8")
    rewards = "reward.py" if env == POSIX else "奖励.py"  # ascii has no name for the other
    text = "def f_reward(completions, **columns):\n    return [len(t) / len('数') for t in completions]\n"
    (tmp_path / rewards).write_text(text, encoding="utf-8")
    (tmp_path / "t.yaml").write_text(SETTINGS.replace("奖励.py", rewards), encoding="utf-8")
    done = python(str(PROJECT / "train.py"), "--config", "t.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = Path(tmp_path / "runs/t/train.log").read_text(encoding="utf-8")
    assert "小明😀" in logged and "留出集" in logged
    asked = python(str(PROJECT / "inference.py"), "--json", "小明😀", env=env, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert json.loads(asked.stdout.decode(env.get("PYTHONIOENCODING", "ascii")))["question"] == "小明😀"
    assert os.listdir(tmp_path / "output/checkpoint_1")
