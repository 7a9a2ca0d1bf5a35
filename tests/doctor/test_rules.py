"""Every rule finds two recorded runs that went wrong in its way, and nothing in healthy ones.

The recordings are real runs of train.py (record.py); a rule that is always silent, or always speaks, fails here.
"""

import string
import unicodedata

import pytest

from grpo.doctor import texts_en, texts_zh
from grpo.doctor.findings import diagnose
from grpo.doctor.recording import Recording, read_run
from grpo.doctor.report import WIDTH, lines_of
from grpo.doctor.rules import RULES
from tests.doctor.cases import BAD, HEALTHY, TRIGGERS
from tests.doctor.ready import READY, TRUE
from tests.doctor.record import RECORDED, unpack

MAX_BYTES = 2**20  # of all recordings


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: read_run(unpack(name, folder / name)) for name in sorted(HEALTHY | BAD | READY)}


def rules_of(run) -> set[str]:
    return {finding.rule for finding in diagnose(run, RULES)}


def test_every_rule_has_two_runs_of_its_own():
    assert set(TRIGGERS) == set(RULES) and len(RULES) >= 15
    assert all(first != second and {first, second} <= set(BAD) for first, second in TRIGGERS.values())
    assert {name for pair in TRIGGERS.values() for name in pair} == set(BAD), "a recording that no rule needs"


@pytest.mark.parametrize(("rule", "which"), [(rule, which) for rule in TRIGGERS for which in (0, 1)])
def test_the_rule_finds_the_run_that_went_wrong(rule, which, runs):
    assert rule in rules_of(runs[TRIGGERS[rule][which]])


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name, runs):
    """The demo, the real model, and two rewards with several updates a step."""
    assert rules_of(runs[name]) == set()


@pytest.mark.parametrize("name", READY)
def test_the_findings_of_a_ready_configuration_are_listed(name, runs):
    assert rules_of(runs[name]) == TRUE[name]


def test_no_rule_speaks_about_most_runs(runs):
    """So that a rule whose condition is nearly always true is noticed."""
    counts = {rule: sum(rule in rules_of(run) for run in runs.values()) for rule in RULES}
    assert max(counts.values()) <= len(runs) / 3, counts


def test_the_recordings_are_small():
    assert sum(file.stat().st_size for file in RECORDED.iterdir()) <= MAX_BYTES
    assert {file.stem for file in RECORDED.iterdir()} == set(HEALTHY | BAD | READY)


def steps_of(**means):
    """Twelve steps in which f is learned, and other functions have one score throughout."""
    others = {
        f"reward/{name}/{kind}": value for name, mean in means.items() for kind, value in (("mean", mean), ("std", 0.0))
    }
    return [
        {"step": step, "reward/mean": step / 12, "reward/f/mean": step / 12, "reward/f/std": 0.3, **others}
        for step in range(1, 13)
    ]


@pytest.mark.parametrize(
    ("name", "weight", "speaks"),
    [("tagged", 1.0, True), ("tagged", 0.0, False), ("overlong_reward", 1.0, False), ("length_penalty", 1.0, False)],
)
def test_a_penalty_that_nothing_earns_is_no_reward_that_is_never_given(name, weight, speaks):
    run = Recording("r", steps_of(**{name: 0.0}), config={"rewards": {"f": 1.0, name: weight}})
    assert rules_of(run) & {"never_given", "one_sided"} == ({"never_given", "one_sided"} if speaks else set())


def test_what_was_left_out_for_other_reasons_counts_as_looked_at():
    said = "data d: 900 questions kept, 200 dropped as too long, 6361 dropped: after the first 1024 (data_rows), "
    said += "102 held out for evaluation"
    few = Recording("r", [{"step": 1}], log=[said])
    many = Recording("r", [{"step": 1}], log=[said.replace(" 6361 ", " 0 ")])
    assert ("left_out" in rules_of(few), "left_out" in rules_of(many)) == (False, True)


def names_in(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_have_the_same_texts():
    assert set(texts_en.RULES) == set(texts_zh.RULES) == set(RULES)
    for english, chinese in [
        *((texts_en.RULES[rule], texts_zh.RULES[rule]) for rule in RULES),
        (list(texts_en.WHY.values()), list(texts_zh.WHY.values())),
        (list(texts_en.LABELS.values()), list(texts_zh.LABELS.values())),
    ]:
        assert [names_in(text) for text in english] == [names_in(text) for text in chinese]
    assert set(texts_en.WHY) == set(texts_zh.WHY) and set(texts_en.LABELS) == set(texts_zh.LABELS)


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_finding_can_be_said(language, runs):
    """Every value that a text names is there, in every recorded run; what is said fits a terminal and is printable."""
    for run in runs.values():
        lines = list(lines_of(run, diagnose(run, RULES), language))
        text = "\n".join(lines)
        assert "".join(letter for letter in text if letter not in "\n\u3000").isprintable()
        assert max(map(columns, lines)) <= WIDTH + 2
