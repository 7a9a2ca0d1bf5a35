"""The scripts in launch/ and .ci/run. Installing is played by a stand-in for Python that writes down its calls, so
that order, reuse and repair are tested in milliseconds; exit codes are tested on real torchrun workers."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launcher import PROJECT, environment, fork_script
from tests.support.tiers import sampled, short

SCRIPTS = [*sorted((PROJECT / "launch").glob("*.sh")), PROJECT / ".ci" / "run"]

# Plays both the Python that makes .venv and the one in it. IF_<what> holds shell text to run at that call.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *version_info*) eval "${IF_VERSION:-}" ;;
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *download.pytorch.org*) exit 1 ;;
    *"pip install"*) eval "${IF_INSTALL:-}" ;;
    *torchrun.py*) eval "${IF_TRAIN:-}" ;;
    "-m mypy") eval "${IF_MYPY:-}" ;;
    "-m pytest"*) echo "$VIRTUAL_ENV|$PYTHONPATH|$HF_HUB_OFFLINE" >>"$CALLS"; eval "${IF_PYTEST:-}" ;;
esac
"""


class Sandbox:
    """A copy of the scripts in a folder with a space in its name, and no real Python within their reach."""

    def __init__(self, folder: Path):
        self.root = folder / "a project"
        for name in ("launch", ".ci"):
            shutil.copytree(PROJECT / name, self.root / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(PROJECT / name, self.root)
        (self.root / "demo").mkdir()
        (self.root / "demo" / "test.jsonl").write_text("{}\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.python = self._executable("stand-in", STAND_IN)
        self.gpu(False)
        self.log = folder / "calls"

    def _executable(self, name: str, text: str) -> Path:
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)
        return file

    def gpu(self, there: bool) -> None:
        self._executable("nvidia-smi", f"#!/bin/sh\nexit {0 if there else 9}\n")

    def run(self, script: str, *args: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """Run a script. Returns the finished process and the calls that it made to Python, one string each."""
        self.log.write_text("")
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        full = {"PATH": path, "HOME": str(self.root), "GRPO_PYTHON": str(self.python), "CALLS": str(self.log), **env}
        command = ["bash", str(self.root / script), *args]
        done = subprocess.run(command, env=full, cwd=self.bin, capture_output=True, text=True, timeout=60)
        return done, self.log.read_text().splitlines()


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def installs(calls: list[str]) -> list[str]:
    """What pip was asked to install from the package index, in order: the last word of each call."""
    return [call.split()[-1] for call in calls if "pip install" in call and "download.pytorch.org" not in call]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_may_be_executed(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.stat().st_mode & stat.S_IXUSR


def test_setup_installs_torch_first_then_reuses(sandbox):
    done, calls = sandbox.run("launch/setup.sh")
    assert done.returncode == 0, done.stderr
    assert installs(calls) == ["torch", "."]
    assert all("-c constraints.txt" in call for call in calls if "pip install" in call)
    again, calls = sandbox.run("launch/setup.sh")
    assert "reusing .venv, nothing changed" in again.stdout and not installs(calls)
    _, calls = sandbox.run("launch/setup.sh", "--test")  # the tests need more
    assert installs(calls) == ["torch", ".[test]"]
    for args in ([], ["--test"]):
        assert not installs(sandbox.run("launch/setup.sh", *args)[1])


def test_setup_notices_what_changed(sandbox):
    sandbox.run("launch/setup.sh")
    pyproject = sandbox.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text() + "\n[tool.other]\n")  # below [tool.ruff]: nothing to install
    assert not installs(sandbox.run("launch/setup.sh")[1])
    with (sandbox.root / "constraints.txt").open("a") as file:
        file.write("rich==1\n")
    assert installs(sandbox.run("launch/setup.sh")[1]) == ["torch", "."]
    moved = sandbox.root.with_name("elsewhere")
    sandbox.root.rename(moved)
    sandbox.root = moved
    assert installs(sandbox.run("launch/setup.sh")[1]) == ["torch", "."]


def test_interrupted_installation_starts_anew(sandbox):
    died, _ = sandbox.run("launch/setup.sh", IF_INSTALL="touch .venv/half; kill -9 $PPID")
    assert died.returncode == -9 and (sandbox.root / ".venv" / "half").exists()
    done, calls = sandbox.run("launch/setup.sh")
    assert "interrupted" in done.stdout and installs(calls) == ["torch", "."]
    assert not (sandbox.root / ".venv" / "half").exists()


def test_broken_environment_is_made_anew(sandbox):
    sandbox.run("launch/setup.sh")
    python = sandbox.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    done, calls = sandbox.run("launch/setup.sh")
    assert done.returncode == 0 and "does not work" in done.stdout and installs(calls) == ["torch", "."]


def test_failed_installation_says_so_and_continues(sandbox):
    failed, _ = sandbox.run("launch/setup.sh", IF_INSTALL="touch .venv/kept; exit 1")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: torch could not be installed")
    done, calls = sandbox.run("launch/setup.sh")
    assert done.returncode == 0 and installs(calls) == ["torch", "."]
    assert (sandbox.root / ".venv" / "kept").exists()


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_old_python_is_refused_in_one_line(sandbox, script):
    done, _ = sandbox.run(script, IF_VERSION="exit 1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Python 3.10 or newer" in done.stderr
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("there", [True, False])
def test_cpu_build_is_looked_for_only_without_a_gpu(sandbox, there):
    if not there and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    if not there and not sys.platform.startswith("linux"):
        pytest.skip("only Linux has two builds")
    sandbox.gpu(there)
    done, calls = sandbox.run("launch/setup.sh")
    assert any("download.pytorch.org" in call for call in calls) == (not there)
    assert ("taking torch from the package index" in done.stdout) == (not there)
    assert installs(calls) == ["torch", "."]


def test_test_script_runs_every_check_offline(sandbox):
    done, calls = sandbox.run("launch/test.sh", "--full", "-k", "a b")
    assert done.returncode == 0, done.stderr
    checks = ["-m ruff format --check .", "-m ruff check .", "-m mypy", "-m pytest --full -k a b", "||1"]
    assert calls[-5:] == checks


@pytest.mark.parametrize("mypy, tests, code", [(1, 0, 1), (0, 3, 3), (1, 3, 3)])
def test_test_script_fails_when_any_check_does(sandbox, mypy, tests, code):
    done, calls = sandbox.run("launch/test.sh", IF_MYPY=f"exit {mypy}", IF_PYTEST=f"exit {tests}")
    assert done.returncode == code
    assert ("failed: mypy" in done.stderr) == bool(mypy)
    assert {"-m pytest --part 1", "-m pytest --part 2"} <= {*calls}


@pytest.mark.parametrize("part", ["1", "2"])
def test_test_script_fails_when_one_half_does(sandbox, part):
    """Both halves run to their end, and the output of both is shown."""
    says = f'echo "half ${{*: -1}}"; if [[ $* == *"--part {part}" ]]; then exit 3; fi'
    done, _ = sandbox.run("launch/test.sh", IF_PYTEST=says)
    assert done.returncode == 3
    assert done.stdout.count("half 1") == done.stdout.count("half 2") == 1


def test_ci_runs_the_tests_in_an_environment_of_their_own(sandbox):
    done, calls = sandbox.run(".ci/run", VIRTUAL_ENV="/other", PYTHONPATH="/other", IF_PYTEST="exit 3")
    assert done.returncode == 3
    assert sorted(calls[-4:]) == ["-m pytest --part 1", "-m pytest --part 2", "||1", "||1"]


def test_quickstart_trains_then_asks(sandbox):
    done, calls = sandbox.run("launch/quickstart.sh", "--max_steps", "2", "--output_dir=out", NPROC="3")
    assert done.returncode == 0, done.stderr
    train, _, ask = calls[-3:]
    assert train == "launch/torchrun.py --standalone --nproc_per_node=3 train.py --max_steps 2 --output_dir=out"
    assert ask.startswith("inference.py --output_dir out")
    assert "tensorboard --logdir" in done.stdout


def test_quickstart_returns_the_trainers_code(sandbox):
    done, calls = sandbox.run("launch/quickstart.sh", IF_TRAIN="exit 76")
    assert done.returncode == 76
    assert not any("inference.py" in call for call in calls)


@pytest.mark.parametrize("script, args, env", [("quickstart.sh", [], {"NPROC": "two"}), ("single_node.sh", ["0"], {})])
def test_bad_process_count_is_refused_in_one_line(sandbox, script, args, env):
    done, _ = sandbox.run(f"launch/{script}", *args, **env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "must be a number >= 1" in done.stderr


def test_single_node_returns_the_workers_code_and_line(tmp_path):
    """A real run, stopped by a setting; torchrun alone would exit 1 and add a page of its own."""
    env = {**environment(), "GRPO_PYTHON": sys.executable}
    command = ["bash", PROJECT / "launch" / "single_node.sh", "1", "--lr", "-1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: lr: must be" in done.stderr
    assert "Traceback" not in done.stderr and "exitcode" not in done.stderr  # torchrun's page
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 2


WORKERS = {
    # Rank 1 fails first and with another code: what rank 0 wrote counts.
    "rank 0 tells": ("if rank == 1: sys.exit(1)\ntell(75); time.sleep(2); sys.exit(75)", 75),
    # Nobody could write anything; the 74 of an earlier run in exit.json is not believed.
    "killed": ("if rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)", 128 + 9),
    # A rank falls over after rank 0 was done.
    "late failure": ("if rank == 1: time.sleep(1); sys.exit(5)\ntell(0)", 5),
}


@pytest.mark.parametrize("case", WORKERS)
def test_exit_code_of_real_workers(tmp_path, case):
    code, expected = WORKERS[case]
    settings, out = tmp_path / "settings.yaml", tmp_path / "elsewhere"
    out.mkdir()
    (out / "exit.json").write_text('{"code": 74}')
    settings.write_text(f"model: m\ndata: d\nrewards: {{r: 1}}\noutput_dir: {out}\n")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\nrank = int(os.environ['RANK'])\n"
        f"def tell(code): open({str(out / 'exit.json')!r}, 'w').write('{{\"code\": %d}}' % code)\n{code}\n"
    )
    torchrun = ["launch/torchrun.py", "--standalone", "--nproc_per_node=2"]
    done = fork_script(*torchrun, str(worker), "--config", str(settings), cwd=tmp_path, timeout=120)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    assert ("rank 1 was ended by signal 9" in done.stderr) == (case == "killed")


STARTED = "starts = len(open({log!r}).readlines())\nsave = lambda n: os.makedirs({out!r} + f'/checkpoint_{{n}}')\n"
LIVES = {
    # Killed twice, each time after a new checkpoint; then done.
    "killed, with progress": ("if starts < 3: save(starts); os.kill(os.getpid(), 9)", 0, 3),
    "stalled, with progress": ("if starts < 3: save(starts); tell(74); os._exit(74)", 0, 3),
    # The second life saves nothing: what killed it would kill it again.
    "no progress": ("if starts == 1: save(5)\nos.kill(os.getpid(), 9)", 128 + 9, 2),
    "no more restarts": ("save(starts)\nos.kill(os.getpid(), 9)", 128 + 9, 3),
    "a setting to mend": ("save(starts)\ntell(2); sys.exit(2)", 2, 1),
    "diverged": ("save(starts)\ntell(76); sys.exit(76)", 76, 1),
    "asked to stop": (
        "save(starts)\nimport signal; signal.signal(15, lambda *_: None); os.kill(os.getppid(), 15)\n"
        "time.sleep(1); tell(75); sys.exit(75)",
        75,
        1,
    ),
}


FIRST = ["killed, with progress", "no progress"]


@pytest.mark.parametrize("case", short(LIVES, [*FIRST, *sampled([case for case in LIVES if case not in FIRST])]))
def test_a_killed_or_stalled_run_is_started_again_while_it_gets_on(tmp_path, case):
    """Real torchrun, one worker whose lives are scripted; `starts` counts them."""
    code, expected, lives = LIVES[case]
    out, log, worker = tmp_path / "out", tmp_path / "starts", tmp_path / "worker.py"
    out.mkdir()
    worker.write_text(
        f"import os, sys, time\nopen({str(log)!r}, 'a').write('x\\n')\n"
        f"def tell(code): open({str(out / 'exit.json')!r}, 'w').write('{{\"code\": %d}}' % code)\n"
        + STARTED.format(log=str(log), out=str(out))
        + code
    )
    torchrun = ["launch/torchrun.py", "--restarts", "2", "--standalone", "--nproc_per_node=1", str(worker)]
    settings = ["--model", "m", "--data", "d", "--rewards", '{"r": 1}', "--output_dir", str(out)]
    done = fork_script(*torchrun, *settings, cwd=tmp_path, timeout=120)
    assert (done.returncode, len(log.read_text().splitlines())) == (expected, lives), done.stderr
    assert done.stderr.count("starting it again") == lives - 1
