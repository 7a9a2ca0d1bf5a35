"""The console on a terminal (a pty), in a pipe and with `quiet`; texts that would control a terminal."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from grpo.errors import printable
from grpo.run.console import Console
from grpo.run.live_view import ASCII_BARS, BARS, sparkline
from tests.support.launcher import PROJECT, environment, fork_script

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b5n[red]x[/red]:boom:\u202eevil\ud800\r\x08 end"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself sends: colours, cursor, erase line
ALLOWED = {"m", "K", "A", "h", "l"}  # their last letters: no J (erase the screen), no n (report)

PROGRAM = """
import sys, time
from pathlib import Path
from rich.table import Table
from rich.text import Text
from grpo.run.console import Console
from grpo.errors import warn, printable
HOSTILE = {hostile!r}
console = Console(True, Path(sys.argv[1]) / "train.log")
def sample():
    table = Table("completion")
    table.add_row(Text(printable(HOSTILE + "x" * 600)))
    console.show(table)
    console.write_line("SAMPLE SHOWN")
with console:
    console.start(100, 0, sample=sample)
    for step in range(1, 101):
        metrics = {{"reward/mean": step / 100, "completions/length_mean": 5.0, "tokens_per_s": 9.0, "time/step_s": 0.1}}
        console.write_step(f"step: {{step}}/100  the line of the step", metrics, "training")
        if step == 3:
            console.write_line("line " + HOSTILE)
            console.write_line("y" * 10**6)
            warn("warning " + HOSTILE)
        if step == 60:
            print("READY", flush=True)
        time.sleep(0.03)
print("THE END", flush=True)
"""


def on_terminal(tmp_path, keys: str = "", size=(24, 100), **more_environment: str) -> tuple[int, str, list]:
    """Run PROGRAM on a pty of its own. Returns the exit code, what it wrote, the terminal's settings after it."""
    (tmp_path / "program.py").write_text(PROGRAM.format(hostile=HOSTILE))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=PROJECT,
        env={**environment(), "TERM": "xterm-256color", "PYTHONPATH": str(PROJECT), **more_environment},
        start_new_session=True,
    )
    out, sent, began = b"", False, time.monotonic()
    while time.monotonic() - began < 120:
        if select.select([master], [], [], 0.1)[0]:
            out += os.read(master, 2**16)
        elif process.poll() is not None:
            break
        if keys and not sent and b"[s] sample" in out:
            os.write(master, keys.encode())
            sent = True
    after = termios.tcgetattr(slave)
    os.close(master), os.close(slave)
    return process.wait(10), out.decode("utf-8", "backslashreplace"), after


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    return *on_terminal(folder, keys="s"), folder


def test_a_terminal_shows_progress_and_a_curve_and_no_lines_of_steps(shown):
    code, out, _, folder = shown
    assert code == 0 and "THE END" in out
    assert "100/100" in out and "left" in out and "length 5.0" in out
    assert re.search(rf"reward [{BARS}]{{10,}} 1\.000", out)
    assert "the line of the step" not in out
    assert (folder / "train.log").read_text(encoding="utf-8").count("the line of the step") == 100


def test_a_key_shows_the_last_sample(shown):
    assert "SAMPLE SHOWN" in shown[1] and "completion" in shown[1]


def test_another_key_switches_the_lines_on(tmp_path):
    _, out, _ = on_terminal(tmp_path, keys="l")
    assert "the line of the step" in out and "SAMPLE SHOWN" not in out


def test_the_terminal_is_left_as_it_was(shown):
    """Keys are read without Enter and without echo only while the view is there."""
    flags = shown[2][3]
    assert flags & termios.ICANON and flags & termios.ECHO
    assert shown[1].count("\x1b[?25l") == shown[1].count("\x1b[?25h"), "the cursor is hidden for good"


def test_hostile_text_does_not_control_the_terminal(shown):
    """Only what the view itself sends is left: a plain print of the same text would clear the screen."""
    out = shown[1]
    assert "evil" in out and ":boom:" in out and "[red]x[/red]" in out, "the text is shown, not interpreted"
    sent = CONTROL.findall(out)
    assert {one[-1] for one in sent} <= ALLOWED and "\x1b[2J" not in sent
    rest = CONTROL.sub("", out)
    assert not re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", rest)
    assert "\ud800" not in out and "y" * 90 in out


@pytest.mark.parametrize("size", [(24, 20), (5, 40), (60, 250)])
def test_any_size_will_do(tmp_path, size):
    code, out, _ = on_terminal(tmp_path, size=size)
    assert code == 0 and "THE END" in out


def test_a_dumb_terminal_has_plain_lines(tmp_path):
    code, out, _ = on_terminal(tmp_path, TERM="dumb")
    assert code == 0 and out.count("the line of the step") == 100 and "\x1b" not in out


def test_a_pipe_has_plain_lines(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(hostile=HOSTILE))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        cwd=PROJECT,
        env={**environment(), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the line of the step") == 100 and "\x1b" not in done.stdout + done.stderr


def test_quiet_prints_nothing_and_logs_everything(tmp_path, capsys):
    with Console(True, tmp_path / "train.log", quiet=True) as console:
        console.start(2, 0)
        console.write_line("a line")
        console.write_step("step: 1/2", {}, "training")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "train.log").read_text() == "a line\nstep: 1/2\n"


def test_a_quiet_run_prints_its_last_line_only(tmp_path):
    """Its log has the lines that another run prints."""
    places = ["--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs")]
    few = ["--max_steps", "1", "--eval_rows", "4", "--batch_size", "2", "--report_to", "none", "--device", "cpu"]
    done = fork_script("train.py", "--config", "configs/demo.yaml", *places, *few, "--quiet", "true")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("done: ")
    log = (tmp_path / "runs" / "demo" / "train.log").read_text()
    assert "step: 1/1  reward " in log and "held-out after 1 steps" in log


def test_a_lone_surrogate_ends_no_run(tmp_path):
    """train.log is UTF-8, which has none: without the replacement the write raises."""
    with Console(True, tmp_path / "train.log") as console:
        console.write_line("a\ud800b")
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "a\ufffdb\n"
    with pytest.raises(UnicodeEncodeError):
        "a\ud800b".encode()


def test_readable_text_stays_as_it_is():
    text = "小明\u3000有 3\u00a0个苹果。\n\tعربي ∑ é 👍"
    assert printable(text) == text
    assert printable(HOSTILE).count("\ufffd") == 8


def test_a_curve_goes_from_its_lowest_to_its_highest_value():
    assert sparkline([1, 3, 2]) == "▁█▅" or sparkline([1, 3, 2]) == "▁█▄"
    assert sparkline([-5.0, -5.0]) == "▁▁" and sparkline([]) == "" and sparkline([0, 1], ASCII_BARS) == "_#"
