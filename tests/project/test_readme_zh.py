"""README.zh-CN.md says what README.md says: section by section, block by block, row by row.

What can be compared without understanding either language is compared: levels of headings, fenced blocks byte for
byte, names set as code, targets of links, list items, and names and numbers of every row of a table. The table of
settings alone is left out, since it is generated in English; the Chinese page links to it.
"""

import re
from itertools import zip_longest
from typing import NamedTuple

import pytest

from tests.support.launcher import PROJECT

HEADING = re.compile(r"^(#+) (.+)$")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SETTINGS = re.compile(r"^<!-- config table.*?^<!-- end -->$", re.M | re.S)
HAN = re.compile(r"[\u4e00-\u9fff]")
CODE = re.compile(r"`[^`\n]+`")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
ADVICE = "README.zh-CN.md follows README.md: make the same change in both, and copy fenced blocks as they are"


class Section(NamedTuple):
    """A heading and the text up to the next one."""

    level: int
    title: str
    body: str

    @property
    def prose(self) -> str:
        """The text without fenced blocks and without the generated table."""
        return FENCE.sub("", SETTINGS.sub("", self.body))

    @property
    def rows(self) -> list[str]:
        """Rows of the tables, the ones with the titles included."""
        lines = (line for line in self.prose.splitlines() if line.startswith("|"))
        return [line for line in lines if not re.fullmatch(r"[|: -]+", line)]


def sections(text: str) -> list[Section]:
    """Cut a document at its headings; a # in a fenced block is none."""
    found: list[Section] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.match(line)
        if heading:
            found.append(Section(len(heading[1]), heading[2], ""))
        else:
            found[-1] = found[-1]._replace(body=f"{found[-1].body}{line}\n")
    return found


def read(name: str) -> list[Section]:
    return sections((PROJECT / name).read_text(encoding="utf-8"))


ENGLISH, CHINESE = read("README.md"), read("README.zh-CN.md")
each_section = pytest.mark.parametrize(
    ("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=False)), ids=[s.title for s in ENGLISH[: len(CHINESE)]]
)


def outline(page: list[Section]) -> list[str]:
    return [f"{'#' * s.level} {s.title}" for s in page]


def test_each_heading_has_its_chinese_one_at_the_same_place_and_level():
    pairs = list(zip_longest(outline(ENGLISH), outline(CHINESE), fillvalue="(none)"))
    levels = [[title.split(" ")[0] for title in pair] for pair in pairs]
    assert all(english == chinese for english, chinese in levels), (ADVICE, pairs)
    assert len(ENGLISH) >= 10


def test_headings_are_in_chinese():
    assert [s.title for s in CHINESE[1:] if not HAN.search(s.title)] == []


@each_section
def test_commands_and_examples_are_byte_equal_and_in_order(english, chinese):
    assert FENCE.findall(chinese.body) == FENCE.findall(english.body), ADVICE


def test_there_are_commands_to_compare():
    """No block escapes the expression above: every fence opens or closes one that was compared."""
    for page in (ENGLISH, CHINESE):
        bodies = "".join(s.body for s in page)
        assert 2 * len(FENCE.findall(bodies)) == len(re.findall(r"^\s*```", bodies, re.M))
    assert sum(language == "bash" for s in CHINESE for language, _ in FENCE.findall(s.body)) >= 10


def targets(prose: str) -> list[str]:
    """Where links go; anchors on the page itself, which are in its language, as a lone #."""
    links = [re.sub(r"^#.*", "#", target) for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    return sorted(link for link in links if not link.startswith("README"))


@each_section
def test_names_links_and_items_are_the_same(english, chinese):
    """Names set as code in any order, for the order of words differs; so a renamed setting is seen in both."""
    assert set(CODE.findall(chinese.prose)) == set(CODE.findall(english.prose)), ADVICE
    assert targets(chinese.prose) == targets(english.prose), ADVICE
    items = [len(re.findall(r"^- ", s.prose, re.M)) for s in (english, chinese)]
    bold = [len(re.findall(r"^\*\*", s.prose, re.M)) for s in (english, chinese)]
    assert items[0] == items[1] and bold[0] == bold[1], ADVICE


def facts(row: str) -> tuple[list[str], list[str], int]:
    """Names and numbers of a table's row, and its number of columns."""
    return sorted(CODE.findall(row)), sorted(NUMBER.findall(CODE.sub("", row))), row.count("|")


@each_section
def test_rows_of_tables_hold_the_same_names_and_numbers(english, chinese):
    pairs = zip_longest(english.rows, chinese.rows, fillvalue="(none)")
    assert [pair for pair in pairs if facts(pair[0]) != facts(pair[1])] == [], ADVICE


def test_nothing_is_left_in_english():
    """Every line of text and every row of a table with a word outside code has a Chinese character."""
    lines = [line for s in CHINESE for line in s.prose.splitlines() if re.search(r"[A-Za-z]", CODE.sub("", line))]
    assert len(lines) >= 50
    assert [line for line in lines if not HAN.search(line)] == []


def test_the_pages_link_to_each_other():
    assert "](README.zh-CN.md)" in ENGLISH[0].body and "](README.md)" in CHINESE[0].body
    [settings] = [c for e, c in zip(ENGLISH, CHINESE, strict=False) if SETTINGS.search(e.body)]
    assert "](README.md#configuration)" in settings.body
