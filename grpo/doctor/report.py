"""Findings as text, in English or Chinese. What models and data wrote is shown without control characters."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.doctor import texts_en, texts_zh
from grpo.doctor.findings import Finding, diagnose
from grpo.doctor.recording import Recording, Row, read_run
from grpo.doctor.rules import RULES
from grpo.errors import printable

LANGUAGES: dict[str, ModuleType] = {"en": texts_en, "zh": texts_zh}
MAX_TEXT, MAX_NAME = 400, 80  # characters shown of a text, and of a name
WIDTH = 110
WORD = re.compile(r"[!-~]+ ?|.", re.S)
SHORT_LIMIT = 2**21  # bytes of completions that are read at the end of a run
MIN_SHORT = 10  # steps: the short form is silent about shorter runs


class _Unknown:
    """What a value that is not known looks like, whatever its format."""

    def __format__(self, spec: str) -> str:
        return "-"


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """A text on one line that a terminal shows and does not act on, at most `limit` characters: head and tail.

    >>> clean("a\\x1b[31mred\\n\\u202eb"), clean("x" * 50, 11)
    ('a\ufffd[31mred \ufffdb', 'xxxxx … xxxxx')
    """
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} … {text[-half:]}"
    return " ".join(printable(text).split())


def language_of(name: Any) -> str:
    """The language of a run's `console_language`: zh for either kind of Chinese.

    >>> language_of("zh-Hant"), language_of(None)
    ('zh', 'en')
    """
    return "zh" if isinstance(name, str) and name.startswith("zh") else "en"


def lines_of(run: Recording, findings: Sequence[Finding], language: str) -> Iterator[str]:
    """The report, line by line."""
    texts = LANGUAGES[language]
    labels = texts.LABELS
    yield labels["run"].format(name=clean(run.name, MAX_NAME), steps=len(run.steps), rows=len(run.rows))
    if run.unreadable:
        yield labels["unreadable"].format(count=run.unreadable)
    if not run.config:
        yield labels["no_config"]
    if len(run.steps) < 4:
        yield labels["few"].format(steps=len(run.steps))
    if not findings:
        yield labels["none"]
    for number, finding in enumerate(findings, 1):
        what, evidence, change = texts.RULES[finding.rule]
        values = _shown(finding.evidence.values)
        yield ""
        yield f"{number}. {what} ({finding.rule})"
        yield from _paragraph(labels["evidence"], evidence.format(**values))
        yield from _example(texts, finding)
        yield from _paragraph(labels["change"], change.format(**values))


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _Unknown() if value is None else value if type(value) in (int, float) else clean(str(value))
        for name, value in values.items()
    }


def _example(texts: ModuleType, finding: Finding) -> Iterator[str]:
    row, labels = finding.evidence.example, texts.LABELS
    if row is None:
        return
    nothing = labels["nothing"]
    yield f"   {labels['example'].format(step=row.step, reward=nothing if row.reward is None else f'{row.reward:g}')}:"
    parts = [(labels["question"], row.question), (labels["completion"], row.completion)]
    if row.gold is not None:
        parts.append((labels["gold"], row.gold))
    if row.extracted is not None:
        parts.append((labels["extracted"], row.extracted))
    for name, text in parts:
        yield from _paragraph(name, clean(text), "     ")
    if finding.evidence.why is not None:
        yield from _paragraph(labels["why"], texts.WHY[finding.evidence.why].format(**_of_row(row, nothing)), "     ")


def _of_row(row: Row, nothing: str) -> dict[str, str]:
    texts = {"gold": row.gold, "extracted": row.extracted}
    return {name: nothing if text is None else clean(text, MAX_NAME) for name, text in texts.items()}


def _paragraph(name: str, text: str, indent: str = "   ") -> list[str]:
    """`name: text` in lines of at most WIDTH columns."""
    colon = "：" if name and unicodedata.east_asian_width(name[0]) == "W" else ": "
    return wrap(f"{name}{colon}{text}", WIDTH, indent, indent + "  ")


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most `width` columns. Words are kept whole where they fit; Chinese is cut between any characters.

    >>> wrap("设置 max_steps，或 lr 更高", 16)
    ['设置 max_steps，', '或 lr 更高']
    """
    lines, line, used = [], first, len(first)
    for word in WORD.findall(text):
        for part in (word[at : at + width // 2] for at in range(0, len(word), width // 2)):
            columns = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in part)
            if used + len(part.rstrip()) + columns - len(part) > width and line not in (first, rest):
                lines.append(line)
                line, used = rest, len(rest)
            line += part
            used += columns
    return [one if one.isspace() else one.rstrip() for one in [*lines, line]]


def short_form(folder: Path, language: str) -> str | None:
    """One line about a run that has just ended, or None where there is nothing to say. Never raises."""
    try:
        run = read_run(folder, SHORT_LIMIT)
        findings = diagnose(run, RULES) if len(run.steps) >= MIN_SHORT else []
    except Exception:  # a report must not fail the run that it is about
        return None
    if not findings:
        return None
    texts = LANGUAGES[language_of(language)]
    key = "short_one" if len(findings) == 1 else "short"
    return texts.LABELS[key].format(
        count=len(findings), what=texts.RULES[findings[0].rule][0], folder=clean(str(folder), MAX_TEXT)
    )
