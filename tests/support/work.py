"""Work that is counted and not timed: instructions of Python, characters that text methods touch, steps of patterns.

So a machine's load does not change it. The work of C code is counted separately: `Text` is a str whose methods add the
characters they read and write, and `Counted` walks a pattern's parse tree as a backtracking matcher does. Its result is
compared with that of `re` at every call, so a wrong walk is noticed.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

try:
    from re import _constants as names
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as names
    import sre_parse as parser

AGAIN = 10**5  # frames: one for each repetition of a group


class Work:
    """The count, in units of one instruction, character or step."""

    units = 0
    on = False


class Text(str):
    """A text whose methods are counted and return counted texts."""


def _found(text: str, needle: Any, at: int, start: int = 0, end: int | None = None) -> int:
    """Characters that a search from the left reads."""
    stop = len(text) if end is None else min(end, len(text))
    return (at + len(needle) if at >= 0 else stop) - start


def _touched(name: str, text: str, out: Any, args: tuple) -> int:
    """Characters that a method reads and writes."""
    if name in ("find", "index"):
        return _found(text, args[0], out, *args[1:])
    if name in ("rfind", "rindex"):
        return len(text) - max(out, 0)
    if name in ("startswith", "endswith", "__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__"):
        return len(args[0]) if isinstance(args[0], str) else 1
    if name == "__contains__":
        return _found(text, args[0], str.find(text, args[0]))
    if name == "__getitem__":
        return len(out)
    if name in ("__len__", "__hash__"):
        return 1
    if name == "count" and len(args) > 1:
        return max((args[2] if len(args) > 2 else len(text)) - args[1], 0)
    return len(text) + (len(out) if isinstance(out, str) else 0)


def _counted(value: Any) -> Any:
    if type(value) is str:
        return Text(value)
    return type(value)(map(_counted, value)) if type(value) in (list, tuple) else value


def _method(name: str) -> Callable:
    real = getattr(str, name)

    def call(self: Text, *args: Any, **how: Any) -> Any:
        out = real(self, *args, **how)
        if Work.on and out is not NotImplemented:
            Work.units += max(_touched(name, self, out, args), 1)
        return _counted(out)

    return call


LEFT = {
    "__new__",
    "__init__",
    "__class__",
    "__getattribute__",
    "__init_subclass__",
    "__subclasshook__",
    "__iter__",
    "__repr__",
    "__str__",
    "__format__",
    "__sizeof__",
    "__reduce__",
    "__reduce_ex__",
    "__getnewargs__",
    "__doc__",
    "__dir__",
    "__delattr__",
    "__setattr__",
    "__getstate__",
    "maketrans",
    "__len__",
    "__hash__",
}
for _name in set(dir(str)) - LEFT:
    setattr(Text, _name, _method(_name))
Text.__hash__ = str.__hash__  # type: ignore[method-assign]


class Counted:
    """A compiled pattern that counts its steps."""

    def __init__(self, pattern: re.Pattern):
        self.pattern = pattern
        tree = parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
        self.tree, self.flags = list(tree), tree.state.flags

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"tests/support/work.py counts no Pattern.{name} yet")

    def search(self, text: str, start: int = 0) -> re.Match | None:
        """The first match."""
        return self._try(text, start, range(start, len(text) + 1), self.pattern.search(text, start))

    def match(self, text: str, start: int = 0) -> re.Match | None:
        """A match at the start."""
        return self._try(text, start, [start], self.pattern.match(text, start))

    def fullmatch(self, text: str) -> re.Match | None:
        """A match of all of it."""
        return self._try(text, 0, [0], self.pattern.fullmatch(text), whole=True)

    def finditer(self, text: str, start: int = 0) -> Iterator[re.Match]:
        """All matches."""
        while start <= len(text) and (found := self.search(text, start)):
            yield found
            start = found.end() + (found.end() == found.start())

    def findall(self, text: str) -> list:
        """All matches, as re gives them."""
        for _ in self.finditer(text):
            pass
        return self.pattern.findall(text)

    def sub(self, by: Any, text: str) -> str:
        """All matches replaced."""
        for _ in self.finditer(text):
            pass
        return Text(self.pattern.sub(by, text))

    def _try(self, text: str, start: int, starts: Any, real: re.Match | None, whole: bool = False) -> re.Match | None:
        if not Work.on:
            return real
        plain, before, tracing = str(text), sys.getrecursionlimit(), sys.gettrace()
        sys.settrace(None)  # the walk counts itself
        sys.setrecursionlimit(AGAIN)
        try:
            for first in starts:
                end = self._walk(self.tree, 0, plain, first, lambda at: at if not whole or at == len(plain) else None)
                if end is not None:
                    break
            else:
                end = None
        finally:
            sys.setrecursionlimit(before)
            sys.settrace(tracing)
        assert (real is None) == (end is None) and (real is None or real.span() == (first, end)), self.pattern
        return real

    def _walk(self, tree: list, i: int, text: str, at: int, then: Callable[[int], int | None]) -> int | None:
        """Match tree[i:] at `at`, then the rest. Returns where the whole match ends."""
        Work.units += 1
        if i == len(tree):
            return then(at)
        op, value = tree[i]

        def rest(position: int) -> int | None:
            return self._walk(tree, i + 1, text, position, then)

        if op in (names.MAX_REPEAT, names.MIN_REPEAT):
            least, most, inner = value
            if len(inner) == 1 and self._is_one(inner[0]):
                return self._run(inner[0], least, most, op is names.MAX_REPEAT, text, at, rest)
            return self._again(list(inner), least, most, op is names.MAX_REPEAT, text, at, rest, 0)
        if op is names.SUBPATTERN:
            return self._walk(list(value[3]), 0, text, at, rest)
        if op is names.BRANCH:
            for way in value[1]:
                end = self._walk(list(way), 0, text, at, rest)
                if end is not None:
                    return end
            return None
        if op in (names.ASSERT, names.ASSERT_NOT):
            behind, inner = value
            from_ = at if behind > 0 else at - inner.getwidth()[0]
            found = from_ >= 0 and self._walk(list(inner), 0, text, from_, lambda end: end) is not None
            return rest(at) if found is (op is names.ASSERT) else None
        if op is names.AT:
            return rest(at) if self._at(value, text, at) else None
        return rest(at + 1) if at < len(text) and self._fits(tree[i], text[at]) else None

    def _run(self, one: Any, least: int, most: Any, greedy: bool, text: str, at: int, rest: Callable) -> int | None:
        """A repeated single character."""
        end = at
        if greedy:
            while end < len(text) and end - at < most and self._fits(one, text[end]):
                end += 1
            for position in range(end, at + least - 1, -1):
                found = rest(position)
                if found is not None:
                    return found
            return None
        while True:
            if end - at >= least and (found := rest(end)) is not None:
                return found
            if end >= len(text) or end - at >= most or not self._fits(one, text[end]):
                return None
            end += 1

    def _again(
        self, inner: list, least: int, most: Any, greedy: bool, text: str, at: int, rest: Callable, done: int
    ) -> int | None:
        def more() -> int | None:
            if done >= most:
                return None
            return self._walk(
                inner,
                0,
                text,
                at,
                lambda end: None if end == at else self._again(inner, least, most, greedy, text, end, rest, done + 1),
            )

        ways = (more, lambda: rest(at) if done >= least else None)
        for way in ways if greedy else ways[::-1]:
            found = way()
            if found is not None:
                return found
        return None

    @staticmethod
    def _is_one(node: Any) -> bool:
        return node[0] in (names.LITERAL, names.NOT_LITERAL, names.ANY, names.IN)

    def _fits(self, node: Any, letter: str) -> bool:
        """Whether one character fits one node."""
        Work.units += 1
        op, value = node
        if op is names.ANY:
            return bool(self.flags & re.S) or letter != "\n"
        if op in (names.LITERAL, names.NOT_LITERAL):
            same = letter == chr(value) or (bool(self.flags & re.I) and letter.lower() == chr(value).lower())
            return same is (op is names.LITERAL)
        assert op is names.IN, op
        negated = value[0][0] is names.NEGATE
        tried = {letter, letter.lower(), letter.upper()} if self.flags & re.I else {letter}
        return any(self._in(part, one) for part in value[negated:] for one in tried) is not negated

    def _in(self, part: Any, letter: str) -> bool:
        op, value = part
        if op is names.LITERAL:
            return letter == chr(value)
        if op is names.RANGE:
            return value[0] <= ord(letter) <= value[1]
        kind = str(value).lower().removeprefix("category_")
        pattern = {
            "digit": r"\d",
            "space": r"\s",
            "word": r"\w",
            "not_digit": r"\D",
            "not_space": r"\S",
            "not_word": r"\W",
        }[kind]
        return re.match(pattern, letter, self.flags & re.A) is not None

    def _at(self, kind: Any, text: str, at: int) -> bool:
        if kind in (names.AT_BEGINNING, names.AT_BEGINNING_STRING):
            return at == 0 or bool(self.flags & re.M and kind is names.AT_BEGINNING and text[at - 1] == "\n")
        assert kind in (names.AT_END, names.AT_END_STRING), kind
        if at == len(text) or (kind is names.AT_END and text[at:] == "\n"):
            return True
        return bool(self.flags & re.M and kind is names.AT_END and text[at] == "\n")


def patterns_of(module: ModuleType) -> dict[str, re.Pattern]:
    """The patterns of a module; fails where it uses `re` other than as NAME = re.compile(...) at its top level."""
    with open(str(module.__file__), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    top = [node for made in tree.body if isinstance(made, ast.Assign) for node in ast.walk(made)]
    for node in ast.walk(tree):
        uses = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "re"
        assert not uses or node in top, f"{module.__name__}, line {node.lineno}: compile the pattern at the top"
    return {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}


@contextmanager
def counted_patterns(modules: list[ModuleType]) -> Iterator[None]:
    """Every pattern of these modules counts."""
    before = [(module, patterns_of(module)) for module in modules]
    try:
        for module, patterns in before:
            for name, pattern in patterns.items():
                setattr(module, name, Counted(pattern))
        yield
    finally:
        for module, patterns in before:
            for name, pattern in patterns.items():
                setattr(module, name, pattern)


def work_of(function: Callable[[str], object], text: str) -> int:
    """What a call costs: instructions of Python outside this file, characters and steps inside."""
    Work.units, Work.on, count = 0, True, 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(Text(text))
    finally:
        sys.settrace(before)
        Work.on = False
    return count + Work.units
