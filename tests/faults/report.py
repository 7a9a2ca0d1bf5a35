"""The table of faults: what was tried, how often, how often the promise held.

    python -m tests.faults.report [--full] [-k EXPRESSION]

Runs the tests of this folder (--full: with the long tier; -k: pytest's choice) and prints one row for each fault.
Exit code 1 when a promise did not hold, or when a test ended without its row.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.faults.rows import ELSEWHERE, ROWS
from tests.support.launcher import PROJECT, environment

LINES = "GRPO_FAULT_LINES"  # the file that the fixture `record` appends to


def table(lines: Iterable[dict[str, Any]], failed: Iterable[str]) -> tuple[str, bool]:
    """The rows as Markdown, and whether all promises held.

    lines: what tests recorded. failed: names of faults of which a test failed, recorded or not.

    >>> print(table([{"fault": "F1", "tries": 3, "held": 3, "figure": "orphans 0"}], [])[0].splitlines()[-1])
    | F1 | SIGKILL of the whole job at a random instant | 3 | 3 | orphans 0 |
    """
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = rows.setdefault(line["fault"], {"tries": 0, "held": 0, "figures": []})
        row["tries"] += line["tries"]
        row["held"] += line["held"]
        row["figures"] += [line["figure"]] if line["figure"] not in row["figures"] else []
    for fault in failed:
        row = rows.setdefault(fault, {"tries": 0, "held": 0, "figures": []})
        row["figures"].append("**a test failed**")
    shown = ["| # | fault | tries | held | figure |", "| --- | --- | ---: | ---: | --- |"]
    for fault in sorted(rows, key=lambda name: int(name[1:])):
        row = rows[fault]
        shown.append(f"| {fault} | {ROWS[fault]} | {row['tries']} | {row['held']} | {'; '.join(row['figures'])} |")
    good = all(row["tries"] == row["held"] > 0 for row in rows.values()) and not list(failed)
    return "\n".join(shown), good


def main(argv: list[str]) -> int:
    """Run the tests, print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long tier too")
    parser.add_argument("-k", default="", help="pytest's choice of tests")
    args = parser.parse_args(argv)
    names = {file for tests in ELSEWHERE.values() for file, _ in tests}
    outside = sorted(str(path) for path in (PROJECT / "tests").rglob("test_*.py") if path.name in names)
    with tempfile.TemporaryDirectory() as folder:
        lines, junit = Path(folder) / "lines.jsonl", Path(folder) / "tests.xml"
        lines.touch()
        command = [sys.executable, "-m", "pytest", "tests/faults", *outside, f"--junitxml={junit}", "-k", args.k]
        ran = subprocess.run(
            command + ["--full"] * args.full, cwd=PROJECT, env=environment() | {LINES: str(lines)}, stdout=sys.stderr
        )
        recorded = [json.loads(line) for line in lines.read_text().splitlines()]
        results = outcomes(junit)
    recorded += elsewhere(results)
    shown, good = table(recorded, failures(results))
    print(shown)
    missing = sorted({*ROWS} - {line["fault"] for line in recorded}, key=lambda name: int(name[1:]))
    if not args.k and missing:
        print(f"\nwithout a row: {', '.join(missing)}" + ("" if args.full else " (some are in the long tier alone)"))
        good = good and not args.full
    return 0 if good and ran.returncode == 0 else 1


def outcomes(junit: Path) -> dict[tuple[str, str], str]:
    """(file, test) -> passed, failed or skipped."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase") if junit.exists() else []:
        file = case.get("classname", "").rpartition(".")[2] + ".py"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[file, case.get("name", "")] = outcome
    return found


def elsewhere(results: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """Rows of the faults that tests outside this folder try: a test is a try.

    >>> elsewhere({("test_exchange.py", "test_masks_come_from_lengths_never_from_ids"): "passed"})
    [{'fault': 'F28', 'tries': 1, 'held': 1, 'figure': '1 tests of test_exchange.py'}]
    """
    rows = []
    for fault, tests in ELSEWHERE.items():
        tried: dict[str, list[str]] = {}
        for (file, name), outcome in results.items():
            if outcome != "skipped" and any(file == f and re.match(pattern, name) for f, pattern in tests):
                tried.setdefault(file, []).append(outcome)
        for file, seen in tried.items():
            figure = f"{len(seen)} tests of {file}"
            rows.append({"fault": fault, "tries": len(seen), "held": seen.count("passed"), "figure": figure})
    return rows


def failures(results: dict[tuple[str, str], str]) -> list[str]:
    """Names of the faults of which a test of this folder failed, perhaps before it could record."""
    found = {name.split("_")[1] for (_, name), outcome in results.items() if outcome == "failed" and "_F" in name[:6]}
    return sorted(found & {*ROWS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
