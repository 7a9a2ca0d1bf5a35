"""Reading unit tests from a data column, and the code to be tested from a completion."""

import ast
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any


def last_code(text: str) -> str | None:
    """The content of the last closed fence that is marked as Python, or not marked.

    >>> last_code("```python\\na = 1\\n```\\nso\\n```\\na = 2\\n```"), last_code("```python\\na = 1")
    ('a = 2\\n', None)
    """
    last = None
    lines: list[str] | None = None
    wanted = False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if lines is None and bare.startswith("```"):
            lines, wanted = [], bare[3:].strip().lower() in ("", "python", "python3", "py")
        elif lines is not None and bare == "```":
            last = "".join(lines) if wanted else last
            lines = None
        elif lines is not None:
            lines.append(line)
    return last


@dataclass(frozen=True)
class Case:
    """One test: code that must run to its end, or what a program must print for an input."""

    code: CodeType | None = None
    given: str = ""
    expected: str = ""


def read_tests(given: Any, entry_point: Any = None) -> list[Case]:
    """The tests that a value of the column holds. Raises ValueError where it holds none.

    >>> [len(read_tests(one)) for one in ("assert f(1) == 2\\nassert f(3) == 4", '[{"input": "1", "output": "2"}]')]
    [2, 1]
    """
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if isinstance(given, dict) and "test_cases" in given:
        given = given["test_cases"]
    if isinstance(given, dict) and isinstance(given.get("inputs"), list) and isinstance(given.get("outputs"), list):
        given = [{"input": a, "output": b} for a, b in zip(given["inputs"], given["outputs"], strict=True)]
    if isinstance(given, str):
        return [Case(code) for code in _cut(given, entry_point)]
    tests = []
    for one in given if isinstance(given, (list, tuple)) else []:
        if isinstance(one, str):
            tests.append(Case(_compiled(_parsed(one).body)))
        elif isinstance(one, dict) and {"input", "output"} <= one.keys():
            tests.append(Case(None, str(one["input"]), str(one["output"])))
        else:
            raise ValueError(f"a test must be Python, or an input and an output, got {str(one)[:60]!r}")
    if not tests:
        raise ValueError(f"no tests in {str(given)[:60]!r}")
    return tests


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"a test is no Python ({error}): {text[:60]!r}") from None


def _compiled(body: list[ast.stmt]) -> CodeType:
    if all(isinstance(one, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)) for one in body):
        raise ValueError(f"a test that tests nothing: {ast.unparse(ast.Module(body, []))[:60]!r}")
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec", dont_inherit=True)


def _cut(text: str, entry_point: Any) -> Iterator[CodeType]:
    """Each assert, test function and test method of a text, with the other statements that it needs."""
    body = _parsed(text).body
    checks = any(isinstance(one, ast.FunctionDef) and one.name == "check" for one in body)
    if checks and isinstance(entry_point, str) and entry_point.isidentifier():  # HumanEval's form
        body += ast.parse(f"check({entry_point})").body
    calls: dict[int, list[str]] = {}  # place of a statement -> what runs its tests
    for at, one in enumerate(body):
        if isinstance(one, ast.Assert):
            calls[at] = [""]
        elif isinstance(one, ast.FunctionDef) and one.name.startswith("test"):
            calls[at] = [f"{one.name}()"]
        elif isinstance(one, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in one.bases):
            methods = [inner.name for inner in one.body if isinstance(inner, ast.FunctionDef)]
            run = "_result = {}({!r}).run(); assert _result.wasSuccessful() and not _result.skipped"
            calls[at] = [run.format(one.name, name) for name in methods if name.startswith("test")]
    if not calls:
        yield _compiled(body)
    for at, of_one in calls.items():
        before = body[:at] if isinstance(body[at], ast.Assert) else body
        others = [one for i, one in enumerate(before) if i not in calls]
        for run in of_one:
            yield _compiled([*others, body[at], *ast.parse(run).body])
