"""The Chinese pages say what the English ones say: section by section, line by line.

What can be compared without understanding either language is compared: levels of headings, fenced blocks byte for
byte, and of every paragraph, list item and row of a table its kind, the names set as code, the numbers, and where its
links go. Pages that have no Chinese version are listed in docs/zh/README.md.
"""

import posixpath
import re
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import pytest

from tests.support.launcher import PROJECT

INDEX = "docs/zh/README.md"
PAIRS = {"README.md": "README.zh-CN.md"} | {f"docs/{x}.md": f"docs/zh/{x}.md" for x in ("task", "rewards", "running")}
TRANSLATED = {chinese: english for english, chinese in PAIRS.items()}
HEADING = re.compile(r"^(#+) (.+)$")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HAN = re.compile(r"[\u4e00-\u9fff]")
CODE = re.compile(r"`[^`\n]+`")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SWITCH = re.compile(r"^.*English.* \| .*简体中文.*$", re.M)  # the line that links to the other language
IN_ENGLISH = "（英文）"
ADVICE = "a Chinese page follows its English one: make the same change in both, and copy fenced blocks as they are"


class Section(NamedTuple):
    """A heading and the text up to the next one."""

    level: int
    title: str
    body: str

    @property
    def prose(self) -> str:
        """The text without fenced blocks and without the line that links to the other language."""
        return SWITCH.sub("", FENCE.sub("", self.body))

    @property
    def units(self) -> list[str]:
        """Paragraphs, list items and rows of tables in order, one string each, however their lines are broken."""
        found = [""]
        for line in self.prose.splitlines():
            if not line or line.startswith(("- ", "|")) or found[-1].startswith("|"):
                found.append(line)
            else:
                found[-1] = f"{found[-1]} {line}".strip()
        return [unit for unit in found if unit and not re.fullmatch(r"[|: -]+", unit)]


@cache
def read(name: str) -> list[Section]:
    """Cut a document at its headings; a # in a fenced block is none."""
    found: list[Section] = []
    fenced = False
    for line in (PROJECT / name).read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.match(line)
        if heading:
            found.append(Section(len(heading[1]), heading[2], ""))
        else:
            found[-1] = found[-1]._replace(body=f"{found[-1].body}{line}\n")
    return found


each_pair = pytest.mark.parametrize("names", PAIRS.items(), ids=PAIRS.values())
each_section = pytest.mark.parametrize(
    ("names", "english", "chinese"),
    [
        pytest.param(names, *sections, id=f"{names[1]}: {sections[0].title}")
        for names in PAIRS.items()
        for sections in zip(*map(read, names), strict=False)
    ],
)


def outline(name: str) -> list[str]:
    return [f"{'#' * s.level} {s.title}" for s in read(name)]


@each_pair
def test_each_heading_has_its_chinese_one_at_the_same_place_and_level(names):
    pairs = list(zip_longest(*map(outline, names), fillvalue="(none)"))
    levels = [[title.split(" ")[0] for title in pair] for pair in pairs]
    assert all(english == chinese for english, chinese in levels), (ADVICE, pairs)
    numbers = [[NUMBER.findall(title) for title in pair] for pair in pairs]
    assert all(english == chinese for english, chinese in numbers), (ADVICE, pairs)
    assert len(pairs) >= 6


@each_pair
def test_headings_are_in_chinese(names):
    """The title of README is the project's name."""
    titles = [s.title for s in read(names[1])]
    assert [title for title in titles if not HAN.search(title)] == (titles[:1] if names[0] == "README.md" else [])


@each_section
def test_commands_and_examples_are_byte_equal_and_in_order(names, english, chinese):
    assert FENCE.findall(chinese.body) == FENCE.findall(english.body), ADVICE


def test_there_are_commands_to_compare():
    """No block escapes the expression above: every fence opens or closes one that was compared."""
    for page in (*PAIRS, *TRANSLATED):
        bodies = "".join(s.body for s in read(page))
        assert 2 * len(FENCE.findall(bodies)) == len(re.findall(r"^\s*```", bodies, re.M))
    languages = [language for page in TRANSLATED for s in read(page) for language, _ in FENCE.findall(s.body)]
    assert languages.count("bash") >= 10 and languages.count("python") >= 3


def destination(page: str, link: str) -> tuple[str, int]:
    """Where a link goes: the English name of its page, and which of its headings, if the link has an anchor."""
    if link.startswith(("http://", "https://")):
        return link, 0
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if not anchor:
        return TRANSLATED.get(target, target), 0
    anchors = [re.sub(r"[^\w\- ]", "", s.title.lower()).replace(" ", "-") for s in read(target)]
    return TRANSLATED.get(target, target), anchors.index(anchor) + 1


def facts(page: str, unit: str) -> tuple:
    """What a paragraph, an item or a row has in any language; a name may stand twice in a sentence of one language."""
    kind = (re.match(r"- |\*\*|\||", unit)[0], unit.count("|") if unit.startswith("|") else 0)
    names = CODE.findall(unit)
    numbers = sorted(NUMBER.findall(LINK.sub("", CODE.sub("", unit))))
    links = sorted(destination(page, link) for link in LINK.findall(CODE.sub("", unit)))
    return kind, sorted(names) if unit.startswith("|") else sorted(set(names)), numbers, links


@each_section
def test_paragraphs_items_and_rows_hold_the_same_names_numbers_and_links(names, english, chinese):
    """Names set as code in any order, for the order of words differs; so a renamed setting is seen in both."""
    pairs = zip_longest(english.units, chinese.units, fillvalue="")
    differences = [pair for pair in pairs if facts(names[0], pair[0]) != facts(names[1], pair[1])]
    assert differences == [], ADVICE


@each_pair
def test_nothing_is_left_in_english(names):
    """Every paragraph, item and row with a word outside code has a Chinese character."""
    units = [unit for s in read(names[1]) for unit in s.units if re.search(r"[A-Za-z]", CODE.sub("", unit))]
    assert len(units) >= 15
    assert [unit for unit in units if not HAN.search(CODE.sub("", unit))] == []


@each_pair
def test_the_pages_link_to_each_other(names):
    [switch] = [line for s in read(names[1]) for line in SWITCH.findall(s.body)]
    assert destination(names[1], LINK.findall(switch)[0]) == (names[0], 0)
    if names[0] == "README.md":
        assert "](README.zh-CN.md)" in read("README.md")[0].body
    else:
        assert f"]({posixpath.basename(INDEX)})" in switch


@pytest.mark.parametrize("page", [*TRANSLATED, INDEX])
def test_links_go_to_chinese_pages_or_say_that_the_page_is_english(page):
    for text in (s.prose for s in read(page)):
        for link in LINK.finditer(text):
            path = link[1].partition("#")[0]
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
            assert target not in PAIRS, f"{link[1]} has a Chinese version: {PAIRS[target]}"
            chinese = not path or target in (*TRANSLATED, INDEX) or not path.endswith(".md") or ":" in path
            assert text.startswith(IN_ENGLISH, link.end()) != chinese, link[1]


def test_the_index_lists_every_page_of_docs():
    """In Chinese where there is a Chinese page, else marked as English by the test above."""
    linked = {destination(INDEX, link)[0] for s in read(INDEX) for link in LINK.findall(s.prose)}
    assert {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs").glob("*.md")} <= linked
    chinese = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs" / "zh").glob("*.md")}
    assert chinese == {*TRANSLATED, INDEX} - {"README.zh-CN.md"}


def test_the_chinese_readme_is_two_screens():
    """About 3,000 characters and foreign words take the room of 1,800 English words."""
    text = (PROJECT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(HAN.findall(text)) + len(re.findall(r"[A-Za-z0-9_./-]+", FENCE.sub("", text))) <= 3000
