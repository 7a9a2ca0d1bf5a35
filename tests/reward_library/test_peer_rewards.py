"""Inputs of TRL's and open-r1's reward tests, and of verl's GSM8K scorers: their value, ours, and why one differs.

A row without a reason has the same value on both sides. docs/rewards.md has the rows with a reason, one by one. With
--full the column of TRL's values is compared with TRL itself, where it is installed.
"""

import re
from typing import Any, NamedTuple

import pytest

import reward_func
from tests.support.launcher import PROJECT


class Case(NamedTuple):
    theirs_name: str
    text: str
    gold: str
    theirs: float | None
    ours_name: str
    ours: float | None
    why: str = ""
    length: int | None = None  # tokens; None: one for each word
    ours_how: dict[str, Any] = {}  # noqa: RUF012
    theirs_how: dict[str, Any] = {}  # noqa: RUF012
    weight: float = 1.0  # on our side


def same(theirs_name, text, gold, value, ours_name, **how):
    return Case(theirs_name, text, gold, value, ours_name, value, **how)


RIGHT, WRONG = r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}"
GOLD = r"\frac{63}{400}"
THIRD = r"\frac{1}{3}"

THINK_VALID = [
    "<think>This is my reasoning.</think>This is my answer.",
    "<think>\nThis is my reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is\nmy reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is <some tag> my reasoning.</think>\nThis is my answer.",
    "<think></think>\nThis is my answer.",
]
THINK_INVALID = [
    "<think>\nThis is my reasoning.\nThis is my answer.",
    "<think>This is my reasoning.\nThis is my answer.",
    "This is my reasoning. This is my answer.",
    "This is my reasoning.\nThis is my answer.",
    "This is my reasoning.</think>\nThis is my answer.",
    "This is my reasoning.</think>This is my answer.",
    "This<think>is my reasoning.</think>\nThis is my answer.",
    "<think>This is<think>my reasoning.</think></think>This is my answer.",
    "<think>This is</think>\nmy\n<think>reasoning.</think>\nThis is my answer.",
]
THINKS = [
    same("TRL think_format_reward", text, "", float(texts is THINK_VALID), "think_format_reward")
    for texts in (THINK_VALID, THINK_INVALID)
    for text in texts
]

OVERLONG = [
    same(
        "TRL soft_overlong_punishment",
        "",
        "",
        value,
        "overlong_reward",
        length=length,
        ours_how={"max_length": 100, "buffer": 20},
    )
    for length, value in ((50, 0.0), (110, -1.0), (90, -0.5))
]

BOXES = [
    ("TRL", RIGHT, GOLD, 1.0),
    ("TRL", RIGHT, "63/400", 1.0),
    ("TRL", WRONG, GOLD, 0.0),
    ("TRL", r"\boxed{3}", "6", 0.0),
    ("TRL", "Answer is forty two.", "Answer is forty two.", None),
    ("TRL", r"Some other content. \boxed{43}.", "Answer is forty three.", None),
    ("TRL", r"\boxed{" + THIRD + "}", THIRD, 1.0),
    ("open-r1", RIGHT, GOLD, 1.0),
    ("open-r1", WRONG, GOLD, 0.0),
]
TAGS_WANTED = "`accuracy_reward` here is another rule: the first `<answer>`, its tags on lines of their own"
ACCURACY = [same(f"{peer} accuracy_reward", text, gold, v, "boxed_math_reward") for peer, text, gold, v in BOXES]
ACCURACY += [
    Case("TRL accuracy_reward", RIGHT, GOLD, 1.0, "accuracy_reward", 0.0, TAGS_WANTED),
    Case(
        "TRL accuracy_reward",
        r"My answer is $\frac{1}{3}$.",
        THIRD,
        1.0,
        "boxed_math_reward",
        0.0,
        "a box is asked for, so that the answer cannot be hidden among formulas",
    ),
    Case(
        "open-r1 accuracy_reward, in its first versions",
        r"\boxed{43}",
        "forty two",
        1.0,
        "boxed_math_reward",
        None,
        "an unreadable gold says nothing about a completion: the function is left out",
    ),
    Case(
        "TRL accuracy_reward",
        r"\boxed{\text{east}}",
        "east",
        None,
        "boxed_math_reward",
        1.0,
        "words are compared as words; a gold that spells a number out is unreadable on both sides",
    ),
]

THOUGHT = "<think> Reasoning content </think> "
BEHIND = {"after": "</think>"}
REASONING = [
    same("TRL reasoning_accuracy_reward", text, gold, value, "boxed_math_reward", ours_how=BEHIND)
    for text, gold, value in (
        (THOUGHT + RIGHT, GOLD, 1.0),
        ("Reasoning content </think> " + RIGHT, GOLD, 1.0),
        (THOUGHT + WRONG, GOLD, 0.0),
        (r"<think> My answer is \boxed{42} </think> Some other text.", r"\boxed{42}", 0.0),
        (r"<think> The answer is \boxed{42} </think> Here's a wrong answer: \boxed{43}.", r"\boxed{42}", 0.0),
        ("<think> Incomplete reasoning without closing tag", GOLD, 0.0),
        (r"Correct answer \frac{63}{400} but completely missing reasoning content", GOLD, 0.0),
        (THOUGHT + r"\boxed{42}", "forty two", None),
    )
]
REASONING += [
    same(
        "TRL reasoning_accuracy_reward",
        f"<REASONING_START> Reasoning content </REASONING_END> {RIGHT}",
        GOLD,
        1.0,
        "boxed_math_reward",
        ours_how={"after": "</REASONING_END>"},
        theirs_how={"reasoning_delimiters": ["</REASONING_END>"]},
    )
]

LENGTHS = [(25, 0.92678), (75, 0.57322), (50, 0.75), (0, 1.0), (100, 0.5), (200, 0.5)]
COSINE = [
    same(
        "TRL cosine_scaled_reward",
        rf"\boxed{{{answer}}}",
        THIRD,
        sign * value,
        "cosine_length_reward",
        length=length,
        ours_how={"max_length": 100},
        theirs_how={"max_len": 100},
    )
    for answer, sign in ((THIRD, 1), (r"\frac{1}{2}", -1))
    for length, value in LENGTHS
]
COSINE += [
    same(
        "TRL cosine_scaled_reward",
        r"\boxed{42}",
        "forty two",
        None,
        "cosine_length_reward",
        length=50,
        ours_how={"max_length": 100},
        theirs_how={"max_len": 100},
    ),
    same(
        "TRL cosine_scaled_reward",
        rf"\boxed{{{THIRD}}}",
        THIRD,
        1.0,
        "cosine_length_reward",
        length=50,
        ours_how={"max_length": 100, "min_value_correct": 0.0, "max_value_correct": 2.0},
        theirs_how={"max_len": 100, "min_value_correct": 0.0, "max_value_correct": 2.0},
    ),
]
COSINE += [  # its text is as long as the numbers say in characters; here the ids are
    same(
        "open-r1 cosine_scaled_reward", text, GOLD, value, "cosine_length_reward",
        length=length, ours_how={"max_length": 100},
    )
    for text, length, value in ((RIGHT, 22, 0.943), (RIGHT, 80, 0.547), (WRONG, 22, -0.943), (WRONG, 80, -0.547))
]  # fmt: skip
COSINE += [
    Case(
        "open-r1 cosine_scaled_reward",
        RIGHT,
        GOLD,
        0.943,
        "cosine_length_reward",
        0.979,
        "length is counted in tokens, theirs in characters (22 of them)",
        length=13,
        ours_how={"max_length": 100},
    )
]

ONE_LINE = "<think>Some reasoning</think><answer>The answer</answer>"
LINES = "<think>\nSome reasoning\n</think>\n<answer>\nThe answer\n</answer>"
FORMAT = [
    same("open-r1 format_reward", text, "", value, "format_reward")
    for text, value in (
        (LINES, 1.0),
        ("<think>Only thinking</think>", 0.0),
        ("<answer>Only answer</answer>", 0.0),
        ("No tags at all", 0.0),
        ("<think>Missing closing</think><answer>Missing closing", 0.0),
        ("<think>Wrong order</answer><answer>Wrong order</think>", 0.0),
    )
]
FORMAT += [
    Case(
        "open-r1 format_reward, before tags stood on lines",
        ONE_LINE,
        "",
        1.0,
        "format_reward",
        0.0,
        "open-r1's later rule: tags on lines of their own; `multiline_format_reward` gives 1",
    ),
    same("open-r1 format_reward", ONE_LINE, "", 1.0, "multiline_format_reward"),
    Case(
        "open-r1 format_reward",
        LINES + "\nand more",
        "",
        1.0,
        "multiline_format_reward",
        0.0,
        "nothing may stand outside; `format_reward` gives 1 as theirs",
    ),
]

STEPS = [
    same("open-r1 reasoning_steps_reward", text, "", value, "reasoning_steps_reward")
    for text, value in (
        ("Step 1: First step\nStep 2: Second step\nStep 3: Third step", 1.0),
        ("First, we do this.\nSecond, we do that.\nFinally, we conclude.", 1.0),
        ("Step 1: Only step", 1 / 3),
        ("First, we do this.\nFinally, we conclude.", 2 / 3),
        ("Just plain text without any clear steps", 0.0),
    )
]

REPEATS = [  # each word is one token here
    same(
        "open-r1 repetition_penalty_reward",
        text,
        "",
        value,
        "repetition_reward",
        ours_how={"length": n},
        weight=-worst,
    )
    for text, n, worst, value in (
        ("this is a test sentence", 2, -1.0, 0.0),
        ("this this this this this", 2, -1.0, -0.75),
        ("this is a this is a test", 2, -1.0, -1 / 3),
        ("this is a test", 3, -0.5, 0.0),
        ("test test test test", 3, -0.5, -0.25),
        ("", 2, -1.0, 0.0),
        ("this is a this is a test", 3, -2.0, -0.4),
        ("word", 3, -1.0, 0.0),
        ("two words", 3, -1.0, 0.0),
        ("three different words", 3, -1.0, 0.0),
        ("word word word word", 3, -1.0, -0.5),
        ("one two one two", 3, -1.0, 0.0),
        ("A B C A B", 3, -0.5, 0.0),
        ("A B C A B C", 3, -1.0, -0.25),
        ("A B C A B C E F G A B C A B C", 3, -1.0, -5 / 13),
        ("A B C D E F G H I J K L", 3, -1.0, 0.0),
    )
]
REPEATS += [
    Case(
        "open-r1 repetition_penalty_reward",
        "This THIS this",
        "",
        -0.5,
        "repetition_reward",
        0.0,
        "runs are of tokens, theirs of words in small letters; TRL's are of tokens",
        ours_how={"length": 2},
    )
]

TO_END = {"start": "####", "end": ""}
BY_VALUE = "numbers are compared by value, theirs as text"
GSM8K = [
    same("verl gsm8k strict", text, gold, value, "numeric_reward", ours_how=TO_END)
    for text, gold, value in (
        ("2 * 36 = 72\n#### 72", "72", 1.0),
        ("2 * 36 = 72\n#### 71", "72", 0.0),
        ("The answer is 72", "72", 0.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 72 eggs", "72", 1.0),
        ("#### 7%", "7", 1.0),
        ("#### -5", "-5", 1.0),
    )
]
GSM8K += [
    Case("verl gsm8k strict", text, gold, theirs, "numeric_reward", 1.0 - theirs, why, ours_how=TO_END)
    for text, gold, theirs, why in (
        ("#### 8.0", "8", 0.0, BY_VALUE),
        ("#### .5", "0.5", 0.0, BY_VALUE),
        ("#### −5", "-5", 0.0, "a minus sign is one in any script"),
        ("#### $18", "18", 0.0, "a currency sign may stand before a number"),
        ("####8", "8", 0.0, "no blank is needed"),
        ("#### 4\nwait 5", "4", 1.0, "what follows belongs to the answer, and two numbers are none"),
        ("#### 12 or 10", "12", 1.0, "two numbers are no answer"),
    )
]
AS_TEXT = "the text is compared; `numeric_reward` gives 1"
GSM8K += [
    same("verl gsm8k strict", "#### 72", "72", 1.0, "final_answer_reward"),
    Case("verl gsm8k strict", "#### 1,234", "1234", 1.0, "final_answer_reward", 0.0, AS_TEXT),
    same("verl gsm8k flexible", "2 * 36 makes 72", "72", 1.0, "last_number_reward"),
    same("verl gsm8k flexible", "It is 29, or 30", "29", 0.0, "last_number_reward"),
    same("verl gsm8k flexible", "no number", "29", 0.0, "last_number_reward"),
]
GSM8K += [
    Case("verl gsm8k flexible", text, gold, theirs, "last_number_reward", 1.0 - theirs, why)
    for text, gold, theirs, why in (
        ("It is 72.", "72", 0.0, "a full stop ends a sentence, not a number"),
        ("It is 1,234", "1234", 0.0, "commas of thousands are read"),
        ("It is 5 m2", "5", 0.0, "a digit behind a letter is no number"),
        ("10-7", "-7", 1.0, "a minus behind a digit subtracts"),
    )
]

CASES = [*THINKS, *OVERLONG, *ACCURACY, *REASONING, *COSINE, *FORMAT, *STEPS, *REPEATS, *GSM8K]
NEEDS_MATH = {"boxed_math_reward", "accuracy_reward", "cosine_length_reward"}


def ids_of(case):
    """As many as it says; else one for each word."""
    return [hash(word) for word in case.text.split()] if case.length is None else [1] * case.length


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.theirs_name} {case.ours_name} {case.text[:20]!r}")
def test_our_value(case):
    if case.ours_name in NEEDS_MATH:
        pytest.importorskip("math_verify")
    ids = [ids_of(case)]
    columns = {"answer": [case.gold], "completion_ids": ids}
    for completion in (case.text, [{"role": "assistant", "content": case.text}]):
        [score] = getattr(reward_func, case.ours_name)(completions=[completion], **columns, **case.ours_how)
        assert (score if score is None else score * case.weight) == pytest.approx(case.ours, abs=1.1e-3)


def test_every_difference_has_its_reason_and_nothing_else_has_one():
    for case in CASES:
        alike = case.theirs == case.ours or (
            None not in (case.theirs, case.ours) and abs(case.theirs - case.ours) < 1e-3
        )
        assert alike == (not case.why), case
    assert sum(not case.why for case in CASES) > 80


@pytest.mark.parametrize("page", ["docs/rewards.md", "docs/zh/rewards.md"])
def test_the_page_has_every_difference(page):
    def shown(value):
        return "None" if value is None else f"{value:g}"

    text = (PROJECT / page).read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in re.findall(r"^\| (.* \| `[a-z_]+` [\w.-]+ \| .*) \|$", text, re.M)]
    found = {(row[0].partition(",")[0].partition("，")[0], *row[1:5]) for row in rows}
    wanted = {
        (
            case.theirs_name.partition(",")[0],
            "`" + case.text.replace("\n", "↵") + "`",
            f"`{case.gold}`" if case.gold else "",
            shown(case.theirs),
            f"`{case.ours_name}` {shown(case.ours)}",
        )
        for case in CASES
        if case.why
    }
    assert found == wanted
    same_ones = sum(not case.why for case in CASES)
    assert {len(CASES), len(GSM8K), same_ones} <= set(map(int, re.findall(r"\b\d+\b", text.split("\n## TRL")[1])))
    if "zh" not in page:
        assert [row[5] for row in rows] == [case.why for case in CASES if case.why]


@pytest.mark.full
def test_the_values_of_trl_are_those_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    for case in CASES:
        peer, _, name = case.theirs_name.partition(" ")
        if peer != "TRL":
            continue
        if name == "cosine_scaled_reward":
            function = rewards.get_cosine_scaled_reward(**case.theirs_how)
        elif name == "soft_overlong_punishment":
            function = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
        else:
            function = getattr(rewards, name)
        how = {} if name == "cosine_scaled_reward" else case.theirs_how
        given = {"solution": [case.gold], "completion_ids": [ids_of(case)], **how}
        if name == "soft_overlong_punishment":
            given = {"completion_ids": [ids_of(case)]}
        [value] = function(completions=[[{"role": "assistant", "content": case.text}]], **given)
        assert value == pytest.approx(case.theirs, abs=1e-4), case
