"""Deliberate breakages, at least one for each promise of docs/guarantees.md, and the tests that must catch them.

    python -m tests.breakages [NAME ...]        all of them, or those named; about a quarter of an hour for all

Copies the project into a temporary folder, applies one edit at a time and runs only the named tests there, those of
the short tier. Prints whether a test failed. Exit code 1 when a breakage was not caught; ValueError when a text to be
replaced does not occur exactly once. tests/project/test_breakages.py checks the texts whenever the tests run.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[1]
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "runs", "output", "*.egg-info")


@dataclass(frozen=True)
class Breakage:
    """One edit of the product, and the tests of which at least one must fail with it."""

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """The broken file's text. Raises ValueError when `old` does not occur exactly once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {text.count(self.old)} times the text\n{self.old}")
        return text.replace(self.old, self.new)


def table() -> list[Breakage]:
    """The breakages of tests/breakages.yaml."""
    rows = yaml.safe_load((PROJECT / "tests" / "breakages.yaml").read_text(encoding="utf-8"))
    return [Breakage(**{**row, "tests": tuple(row["tests"])}) for row in rows]


BREAKAGES = table()


def caught(breakage: Breakage, root: Path, scratch: Path) -> tuple[str, float]:
    """("yes", "no" or what went wrong, seconds) of the tests in a broken copy, which is mended afterwards."""
    file = root / breakage.file
    whole, broken = file.read_text(encoding="utf-8"), breakage.applied(root)
    file.write_text(broken, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tests'}"]
    began = time.monotonic()
    try:
        with (scratch / "log").open("w") as log:
            env = {**os.environ, "PYTHONPATH": str(root)}
            code = subprocess.run(
                [*command, *breakage.tests], cwd=root, env=env, stdout=log, stderr=log, timeout=900
            ).returncode
        outcome = {0: "no", 1: "yes"}.get(code, f"pytest ended with {code}: {(scratch / 'log').read_text()[-600:]}")
    except subprocess.TimeoutExpired:
        outcome = "no end within 900 s"
    finally:
        file.write_text(whole, encoding="utf-8")
        end_leftovers(root, scratch)
    return outcome, time.monotonic() - began


def end_leftovers(*folders: Path) -> None:
    """Kill processes that a broken run left behind: those whose command line or folder is in the copy."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            if any(
                str(folder) in words or os.readlink(f"/proc/{entry}/cwd").startswith(str(folder)) for folder in folders
            ):
                os.kill(int(entry), signal.SIGKILL)
        except OSError:
            continue


def run(breakages: Sequence[Breakage], project: Path = PROJECT) -> int:
    """Try each breakage in a copy of the project and print the table. Returns the exit code."""
    for breakage in breakages:
        breakage.applied(project)
    print("| promise | breakage | caught | seconds |\n|---|---|---|---|", flush=True)
    missed = 0
    with tempfile.TemporaryDirectory(prefix="breakages_") as folder:
        scratch = Path(folder)
        root = scratch / "project"
        shutil.copytree(project, root, ignore=SKIPPED, symlinks=True)
        for breakage in breakages:
            outcome, seconds = caught(breakage, root, scratch)
            missed += outcome != "yes"
            print(f"| {breakage.promise} | {breakage.name} | {outcome} | {seconds:.0f} |", flush=True)
    return int(missed > 0)


def main(names: Sequence[str]) -> int:
    """All breakages, or those named."""
    unknown = set(names) - {breakage.name for breakage in BREAKAGES}
    if unknown:
        raise SystemExit(f"no such breakage: {', '.join(sorted(unknown))}")
    return run([breakage for breakage in BREAKAGES if not names or breakage.name in names])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
