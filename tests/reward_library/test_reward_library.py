"""The reward library: golden rows, values by hand, what no text may do to a function, parameters, the reward model."""

import json
import math
import re
import sys
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo.reward_library as library
import reward_func
from grpo.checkpoints.resume import FREE_TO_CHANGE
from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.config.trl_rewards import BY_NAME
from grpo.errors import UserError
from grpo.reward_library.numeric import number
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import open_rewards
from tests.support.asking_rewards import answers_of
from tests.support.launcher import PROJECT
from tests.support.tiny import tiny_config, tiny_tokenizer
from tests.support.work import Counted, counted_patterns, patterns_of, work_of

NAMES = json.loads((PROJECT / "docs" / "reward_names.json").read_text(encoding="utf-8"))
ROWS = (Path(__file__).with_name("reward_golden.jsonl")).read_text(encoding="utf-8").splitlines()
GOLDEN = [json.loads(line) for line in ROWS]
WITH_MATH = {"accuracy_reward", "math_correctness_reward", "think_answer_total", "math_reward"}
WITH_MATH |= {"boxed_math_reward", "cosine_length_reward"}
PLAIN = sorted(set(library.__all__) - WITH_MATH - {"model_reward", "unit_test_reward"})


def scores(name, *texts, gold="B", **more):
    """One call of a function, as the worker makes it."""
    columns = {"completion_ids": [list(text.encode()) for text in texts], "answer": [gold] * len(texts), **more}
    return getattr(reward_func, name)(prompts=["?"] * len(texts), completions=list(texts), **columns)


# --- the recipes' rules, to the letter


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['seed']}-{row['reward']}")
def test_golden_rows(row):
    """Bit-equal, as text and as a message; floats, so that they travel."""
    function = getattr(reward_func, NAMES[f"{row['seed']}/{row['reward']}"])
    how = {"answer": [row["answer"]], **({"eos_token": row["eos_token"]} if "eos_token" in row else {})}
    as_message = [{"role": "assistant", "content": row["completion"]}]
    for completion in (row["completion"], as_message):
        assert function(prompts=["?"], completions=[completion], **how) == [row["score"]]
        assert type(function(completions=[completion], **how)[0]) is float


def test_golden_rows_are_all_there():
    assert len(GOLDEN) == 264 and {f"{row['seed']}/{row['reward']}" for row in GOLDEN} <= set(NAMES)
    assert {row["score"] for row in GOLDEN} > {-4.5, 0.0, 0.375, 3.999}


def test_names_are_those_of_functions():
    assert set(NAMES.values()) <= set(library.__all__)
    assert all(getattr(reward_func, name) is getattr(library, name) for name in library.__all__)


def test_the_tables_name_every_function_and_its_parameters():
    """docs/rewards.md against reward_names.json and the functions themselves; both ways."""
    text = (PROJECT / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \|", text, re.M)
    assert {f"{recipe}/{theirs}": ours for recipe, theirs, ours in rows} == NAMES
    rest = text.split("## Mended, and more")[1].split("**")[0]
    more = {line.split("`")[1]: line.split(" | ")[-1] for line in rest.splitlines() if line.startswith("| `")}
    assert set(more) == {*library.__all__, "final_answer_reward"} - set(NAMES.values())
    known = {parameter for name in library.__all__ for parameter in getattr(getattr(library, name), "parameters", ())}
    for name, description in more.items():
        parameters = getattr(getattr(reward_func, name), "parameters", ())
        assert set(re.findall(r"`(\w+)`", description)) & known == set(parameters), name


W = "t<end_working_out><SOLUTION>{}</SOLUTION>"
BY_HAND = [  # beyond the golden rows: places where two readings of a rule differ
    ("match_format_exactly", W.format("1") + " </s> \n", 3.0),
    ("match_format_exactly", W.format("1") + "</s></s>", 0.0),
    ("match_format_exactly", W.format("1") + " x</SOLUTION>", 3.0),
    ("match_format_exactly", "<SOLUTION>1</SOLUTION>" + W[:18], 0.0),
    ("check_answer", W.format("73</SOLUTION> x"), -4.5),
    ("check_answer", W.format("80.3"), 2.0),
    ("check_answer", W.format("87"), 1.5),
    ("check_answer", W.format("nan"), -2.5),
    ("check_numbers", W.format("ok, 73"), 0.0),
    ("check_numbers", W.format("- 73"), 3.5),
    ("check_numbers", W.format("--73"), -1.5),
    ("check_numbers", "<SOLUTION></SOLUTION> 73", 3.5),
    ("check_numbers", W.format("2e3"), -1.5),
    ("check_numbers", W.format("٧٣"), 3.5),
    ("format_reward", "<think>\n\n</think>\n<answer>\n\n</answer>", 1.0),
    ("strict_format_reward", "<think>\na\n</think>\n<answer>\n1\n</answer>\n\nbye", 0.5),
    ("hard_format_reward", "<think>\na\n</think>\n<answer>\n1\n</answer>\n\n", 0.5),
    ("soft_xml_reward", "<reasoning></reasoning> </reasoning>\n<answer></answer>", 0.5),
    ("soft_xml_reward", "</reasoning><answer><reasoning></answer>", 0.0),
    ("multiple_choice_reward", f"<reaſonıng>{'x' * 100}</reasoning><answer>x</answer><answer> b\n</answer>", 0.0),
    ("mark_reward", "<think>\n<think>\n</think>\n</think>\n<answer>\n</answer>\n", 0.25),
    ("tag_count_reward", "<think>\n<think>\n\n</think>\n\n<answer>\n\n</answer>\n</answer>", 0.5),
    ("xmlcount_reward", "<think>\n<think>\n\n</think>\n\n<answer>\n\n</answer>\n</answer>", 0.25),
    ("xml_count_reward", "<reasoning>\n<reasoning>\n\n</reasoning>\n\n<answer>\n\n</answer>\n</answer>", 0.25),
    ("match_format_approximately", W.format("1") + "</SOLUTION>", 0.0),
    ("reasoning_steps_reward", "Step 12: a\n- b\n* c\n1.", 1.0),
    ("reasoning_steps_reward", "Step 1 : a", 0.0),
]


@pytest.mark.parametrize("name, text, score", BY_HAND)
def test_rules_where_two_readings_differ(name, text, score):
    assert scores(name, text, gold="73") == [score]


ORIGINAL = re.compile(r"<end_working_out>.*?<SOLUTION>(.+?)</SOLUTION>\s*(?:</s>)?\s*$", re.M | re.S)
PIECES = ["<end_working_out>", "<SOLUTION>", "</SOLUTION>", "</s>", "\n", " ", "7", "a"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_scanner_finds_what_the_pattern_finds(text):
    """Against the rule written as one pattern, which is quadratic, on texts made of its parts."""
    found = ORIGINAL.search(text)
    assert library.working_out.solution(text, "</s>") == (found[1] if found else None)


SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.S)
TAGGED = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "<think>\n",
    "\n</think>\n",
    "\n</answer>",
    "\n",
    " ",
    "a",
]
PATTERNS = {
    "soft_xml_reward": SOFT.search,
    "format_reward": re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.M | re.S).match,
    "strict_format_reward": re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>\n$", re.M | re.S).match,
    "soft_format_reward": re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.S).match,
}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*TAGGED, "<think>\na\n</think>\n<answer>\n", "</answer>\n"]), max_size=9).map("".join))
def test_the_format_rules_say_what_their_patterns_say(text):
    for name, pattern in PATTERNS.items():
        assert bool(scores(name, text)[0]) is bool(pattern(text)), name


# --- what no text may do

HOSTILE = [
    *PIECES,
    *TAGGED,
    "<REASONING>",
    "<answer> ",
    "Step 1",
    "1,",
    "-",
    "{",
    "[",
    '{"a":',
    "```",
    "<aa",
    "½",
    "選",
    "．",
]
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=10).map("".join)


GOOD = [  # for each function one that scores, and one that does not
    "<think>\na\n</think>\n<answer>\n7\n</answer>\n\n",
    "<reasoning>\na\n</reasoning>\n<answer>\n7\n</answer>\n",
    f"<reasoning>{'a' * 100}</reasoning><answer>B</answer>",
    "<answer>?</answer>",
    W.format("7"),
    '{"a": 1}',
    "Next, 7",
    "",
    "a" * 320,
]


@pytest.mark.parametrize("name", PLAIN)
def test_any_text_gets_a_score_that_depends_on_it_alone(name):
    gold = {"json_reward": '{"a": 1}', "refusal_reward": "B", "multiple_choice_reward": "B"}.get(name, "7")
    assert len({scores(name, text, gold=gold)[0] for text in GOOD}) > 1

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(GOOD) | TEXTS, st.sampled_from(GOOD) | TEXTS)
    def check(one, other):
        first, second = scores(name, one, gold=gold), scores(name, other, gold=gold)
        assert scores(name, one, other, one, gold=gold) == [*first, *second, *first]
        assert scores(name, one, gold=gold) == first
        assert all(type(score) is float and math.isfinite(score) for score in first + second)

    for one in GOOD:
        for other in GOOD:
            check.hypothesis.inner_test(one, other)
    check()


@pytest.mark.parametrize("name", sorted(WITH_MATH))
@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="<>answer/\n 17.,=+x$\\", max_size=20), st.sampled_from(["7", "1/2", "x"]))
def test_any_text_gets_a_score_of_mathematics(name, text, gold):
    pytest.importorskip("math_verify")
    wrapped = f"<answer>\n{text}\n</answer>"
    assert scores(name, wrapped, gold=gold) == scores(name, wrapped, gold=gold)
    alone = [*scores(name, text, gold=gold), *scores(name, wrapped, gold=gold)]
    assert scores(name, text, wrapped, gold=gold) == alone and all(map(math.isfinite, alone))


OPENINGS = (
    "",
    "<think>\n",
    "<think>a</think><answer>",
    "<end_working_out><SOLUTION>",
    "<reasoning>a</reasoning><answer>",
)
MODULES = [module for name, module in sorted(sys.modules.items()) if name.startswith("grpo.reward_library.")]


def grows_too_fast(function, make, short=150):
    """Whether twice the text is more than three times the work, which is counted and not timed."""
    return work_of(function, make(2 * short)) > 3 * work_of(function, make(short))


@pytest.mark.parametrize("name", PLAIN)
def test_twice_the_text_is_at_most_three_times_the_work(name):
    reads_text = name not in ("overlong_reward", "length_reward", "repetition_reward")  # else tokens, their ids
    with counted_patterns(MODULES):
        for opening in OPENINGS if reads_text else ("",):
            for piece in sorted({*HOSTILE, "\n\n \t"}) if reads_text else ("a", "<answer>"):

                def make(size, opening=opening, piece=piece):
                    return (opening + piece * (size // len(piece)))[:size] + "x"

                assert not grows_too_fast(lambda text: scores(name, text, gold="{}"), make), (opening, piece)


def last_of_each(text):
    while text:
        text = text[1:]  # a copy


@pytest.mark.parametrize(
    "function, piece",
    [
        (Counted(SOFT).search, "<reasoning>"),  # the pattern that soft_xml_reward avoids
        (lambda text: [here for here in range(len(text)) for _ in text[:here]], "a"),  # a loop over all pairs
        (lambda text: [text.count("b") for _ in text], "a"),  # its inner loop in C
        (last_of_each, "a"),
        (Counted(re.compile(r"(?:a|b)*?c")).search, "ab"),
        (Counted(re.compile(r"\s+$")).search, " \n"),
    ],
)
def test_quadratic_work_is_seen(function, piece):
    """The controls, in Python, in text methods and in patterns."""
    assert grows_too_fast(function, lambda size: piece * (size // len(piece)) + "x")


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_patterns_are_walked_as_re_does(text):
    """Every pattern of the library: `Counted` compares each of its answers with that of re."""
    assert MODULES and work_of(str, "a") < 10
    for module in MODULES:
        for pattern in patterns_of(module).values():
            walked = Counted(pattern)
            work_of(lambda text, walked=walked: (walked.match(text), walked.search(text), walked.fullmatch(text)), text)


# --- the mended ones

NUMBERS = {
    "1,450": 1450,
    "73.0": 73,
    "$73": 73,
    "−8": -8,
    "½": Fraction(1, 2),
    "７３": 73,
    "-$5.50": Fraction(-11, 2),
    "$-5.5": Fraction(-11, 2),
    "US$ 73": 73,
    "2½": Fraction(5, 2),
    "3 1/2 cups": Fraction(7, 2),
    "146/2": 73,
    "73 marbles": 73,
    "60 km/h": 60,
    "50%": 50,
    "9 m²": 9,
    "2 million": 2000000,
    "3万": 30000,
    "73.": 73,
    "**73**": 73,
    "+7": 7,
    "1.5e3": 1500,
    "٧٣": 73,
    ".5": Fraction(1, 2),
    "007": 7,
    "73 €": 73,
    "1,234,567.89": Fraction("1234567.89"),
    "": None,
    "seventy": None,
    "73 of 90": None,
    "73 or 74": None,
    "7²": None,
    "²": None,
    "1,45": None,
    "1,4500": None,
    "1/0": None,
    "1.2.3": None,
    "--7": None,
    "-$-7": None,
    "7-3": None,
    "=7": None,
    "nan": None,
    "inf": None,
    "1e999": None,
    ".": None,
    "$": None,
    "7" * 101: None,
    "__import__": None,
    "10:30": None,
    "1_000": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text):
    assert number(text) == NUMBERS[text]


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
def test_a_number_in_any_dress_is_itself(value):
    plain = f"{value:f}"
    for dressed in (plain, f"{value:,f}", f" {plain} eggs", plain.replace("-", "−")):
        assert number(dressed) == Fraction(value)
    assert number(f"{value + 1:f}") != Fraction(value)


def test_numeric_reward_wants_the_marks():
    assert scores("numeric_reward", "<answer>$1,450.00</answer>", "1450", "<answer>1450", gold="1450") == [
        1.0,
        0.0,
        0.0,
    ]
    assert scores("numeric_reward", "so\n#### 3", "3 ####", gold="3.0", start="####", end="") == [1.0, 0.0]
    assert scores("numeric_reward", "<answer>x</answer>", gold="x") == [None]


def test_math_reward():
    pytest.importorskip("math_verify")
    texts = [r"<answer>$\frac{1}{2}$</answer>", "<answer>0.5</answer>", "<answer>1/3</answer>", "0.5"]
    assert scores("math_reward", *texts, gold="1/2") == [1.0, 1.0, 0.0, 0.0]
    assert scores("math_reward", r"<answer>y+x</answer>", r"<answer>\frac{2x+2y}{2}</answer>", gold="x+y") == [1.0, 1.0]
    assert scores("math_reward", "<answer>1</answer>", gold="") == [None]


SHAPES = [
    ("multiline_format_reward", " <think>\na\n\nb</think>\n\n<answer>\n4\n</answer>\n", {}, 1.0),
    ("multiline_format_reward", "<think>a</think><answer>4</answer> bye", {}, 0.0),
    ("multiline_format_reward", "<think></think><answer>4</answer>", {}, 0.0),
    ("multiline_format_reward", "<think>a</think><answer>4</answer><answer>4</answer>", {}, 0.0),
    ("multiline_format_reward", "<answer>a</answer><think>4</think>", {}, 0.0),
    ("multiline_format_reward", "<reasoning>a</reasoning><answer>4</answer>", {"thought": "reasoning"}, 1.0),
    ("overlong_reward", "a" * 90, {"max_length": 100, "buffer": 10}, 0.0),
    ("overlong_reward", "a" * 95, {"max_length": 100, "buffer": 10}, -0.5),
    ("overlong_reward", "a" * 150, {"max_length": 100, "buffer": 10}, -1.0),
    ("length_reward", "a" * 30, {"target": 20}, 0.5),
    ("length_reward", "", {"target": 20}, 0.0),
    ("repetition_reward", "abcabc", {"length": 3}, -0.25),
    ("repetition_reward", "ab", {"length": 3}, 0.0),
    ("language_reward", "<think>9*8=72</think>", {}, 0.0),
    ("language_reward", "答案是 x", {"language": "zh"}, 0.75),
    ("language_reward", "<answer>答案</answer>", {"language": "zh"}, 1.0),
    ("json_reward", '{"a": 1.0, "b": "x"}', {}, 1.0),
    ("json_reward", '{"a": 1, "b": "y"}', {}, 0.6),
    ("json_reward", '{"a": true, "b": "x"}', {}, 0.6),
    ("json_reward", '{"a": 1, "b": "x", "c": 0, "d": 0}', {}, 0.6),
    ("json_reward", 'so {"a": 1}', {}, 0.0),
    ("json_reward", '{"a": NaN}', {}, 0.0),
    ("json_reward", "[" * 9999, {}, 0.0),
]


@pytest.mark.parametrize("name, text, parameters, score", SHAPES)
def test_shapes_by_hand(name, text, parameters, score):
    assert scores(name, text, gold='{"a": 1, "b": "x"}', **parameters) == pytest.approx([score])


# --- refusal


def answers(*letters):
    return [f"<answer>{letter}</answer>" for letter in letters]


def test_right_beats_refusing_beats_wrong():
    long = "<reasoning>" + "x" * 9 + "</reasoning>"
    assert scores("refusal_reward", *answers("B", " b ", "（Ｂ）", "B.", "?", "？", "A")) == [1, 1, 1, 1, 0.4, 0.4, 0]
    assert (
        scores("refusal_reward", *answers("E", "", "B?", "B or C"), "B", "?", "".join(answers("?", "B"))) == [0.0] * 7
    )
    assert scores(
        "refusal_reward", answers("B")[0], long + answers("B")[0], long + answers("?")[0], min_reasoning=9
    ) == [0.0, 1.0, 0.4]
    assert scores("refusal_reward", *answers("不知道", "?"), marker="不知道", refuse=0.6) == [0.6, 0.0]


@pytest.mark.parametrize("options", [2, 3, 4, 5])
def test_refusing_pays_exactly_when_the_model_is_less_sure_than_r(options):
    """By enumeration: a model that is right in k of 20 cases answers all of them, or refuses all of them."""
    for refuse in (0.55, 0.7, 0.95):
        with closing(open_rewards(refusal(refuse=refuse, options=options), print)):
            pass  # a setting that is let through
        for right in range(21):
            texts = answers(*(["A"] * right + ["B"] * (20 - right)))
            answering = sum(scores("refusal_reward", *texts, gold="A", refuse=refuse, options=options)) / 20
            refusing = sum(scores("refusal_reward", *answers("?"), gold="A", refuse=refuse, options=options))
            assert (refusing > answering) is (right / 20 < refuse)


def refusal(**parameters):
    return Config(rewards={"refusal_reward": 1.0}, reward_parameters={"refusal_reward": parameters}, reward_workers=0)


REFUSED = [
    ({"refuse": 0.25}, "refuse must be a number above 1/options = 0.25, .*got 0.25"),
    ({"refuse": 0.2}, "got 0.2"),
    ({"refuse": 1.0}, "below 1, got 1.0"),
    ({"refuse": "x"}, "got x"),
    ({"refuse": 0.4, "options": 2}, "1/options = 0.5"),
    ({"options": 1}, "options must be a whole number from 2 to 26"),
    ({"options": True}, "whole number"),
    ({"marker": "b"}, "none of the options' letters"),
    ({"marker": " "}, "blank"),
    ({"refusal": 0.4}, "it has no parameter 'refusal'. It has: refuse, options, marker, min_reasoning"),
]


@pytest.mark.parametrize("parameters, error", REFUSED)
def test_a_refusal_that_cannot_pay_is_refused_at_the_start(parameters, error):
    with pytest.raises(UserError, match=error) as caught:
        open_rewards(refusal(**parameters), print)
    assert str(caught.value).startswith("rewards: refusal_reward: ") and "\n" not in str(caught.value)


BAD_PARAMETERS = [
    ("overlong_reward", {"buffer": 300}),
    ("overlong_reward", {"max_length": 0}),
    ("length_reward", {"target": 0}),
    ("repetition_reward", {"length": 0}),
    ("language_reward", {"language": "xx"}),
    ("numeric_reward", {"start": ""}),
    ("multiline_format_reward", {"thought": "answer"}),
    ("check_answer", {"eos_token": ["a"]}),
    ("multiple_choice_reward", {"min_reasoning": -1}),
    ("model_reward", {}),
    ("math_reward", {"end": 3}),
    ("boxed_math_reward", {"after": 3}),
    ("cosine_length_reward", {"rule": "x"}),
    ("cosine_length_reward", {"max_length": 0}),
    ("cosine_length_reward", {"min_value_wrong": "a"}),
]


@pytest.mark.parametrize("name, parameters", BAD_PARAMETERS, ids=lambda value: str(value))
def test_bad_parameters_are_refused_at_the_start(name, parameters):
    with pytest.raises(UserError, match=rf"rewards: {name}: \w+ .*, got "):
        open_rewards(Config(rewards={name: 1.0}, reward_parameters={name: parameters}, reward_workers=0), print)


# --- parameters on their way

MINE = """
def limit_reward(completions, limit=3, folder=None, **columns):
    return [float(len(text) < limit) for text in completions]


def sees_reward(completions, *, refuse=0.5, **columns):
    return [refuse]


sees_reward.parameters = ("refuse",)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_parameters_arrive_and_columns_do_not_pass_for_them(tmp_path, workers):
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path / 'mine.py'}:"
    rewards = dict.fromkeys([f"{mine}limit_reward", f"{mine}sees_reward", "refusal_reward"], 1.0)
    parameters = {f"{mine}limit_reward": {"limit": 9}, "refusal_reward": {"refuse": 0.6}}
    cfg = Config(rewards=rewards, reward_workers=workers, reward_parameters=parameters)
    plain = RewardInput("q", "<answer>", [1], {"answer": "B", "refuse": 7, "options": 9, "limit": 0})
    refusing = RewardInput("q", "<answer>?</answer>", [1], {"answer": "B", "refuse": 7, "options": 9, "limit": 0})
    with closing(open_rewards(cfg, print)) as pool:
        answered = answers_of(pool, [plain, refusing], [Call(0, (0,)), Call(1, (0,)), Call(2, (1,))])
    assert [answer.outcomes for answer in answered] == [[1.0], [0.5], [0.6]]


@pytest.mark.parametrize(
    "settings, error",
    [
        ('{"mork_reward": {}}', "reward_parameters: 'mork_reward' is none of the rewards mark_reward"),
        ('{"mark_reward": 3}', "reward_parameters"),
        ('{"mark_reward": {"a": .inf}}', "reward_parameters: mark_reward: 'a' must be a name, and its value text"),
        ('{"mark_reward": {"a b": 1}}', "must be a name"),
        ('{"mark_reward": {1: 1}}', "must be a name"),
        ('{"mark_reward": {"a": ["\\0"]}}', "must be a name, and its value"),
    ],
)
def test_parameters_that_are_none_are_refused(settings, error):
    with pytest.raises(UserError, match=error) as caught:
        load_config(
            ["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1.0}', "--reward_parameters", settings]
        )
    assert "\n" not in str(caught.value)


def test_parameters_come_from_yaml_and_belong_to_the_run(tmp_path):
    file = tmp_path / "c.yaml"
    given = "{refuse: 0.5, marker: '?', a: '1e3', b: 'null', c: ['7', 7, true, null]}"
    file.write_text(
        f"model: m\ndata: d\nrewards: {{refusal_reward: 1}}\nreward_parameters:\n  refusal_reward: {given}\n"
    )
    cfg, _ = load_config(["--config", str(file)])
    text_stays_text = {"refuse": 0.5, "marker": "?", "a": "1e3", "b": "null", "c": ["7", 7, True, None]}
    assert cfg.reward_parameters == {"refusal_reward": text_stays_text}
    assert "reward_parameters" not in FREE_TO_CHANGE


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package math-verify.*Run: pip install math-verify"):
        library.mathematics.need_math_verify()


# --- the reward model


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Folders of two: one reads from left to right, one both ways."""
    return {name: make_classifier(tmp_path_factory.mktemp(name), name) for name in ("qwen3", "bert")}


@pytest.fixture
def classifier(classifiers):
    return classifiers["qwen3"]


def make_classifier(folder, name):
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(1)
    size = len(tiny_tokenizer())
    both_ways = dict(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    config = BertConfig(**both_ways) if name == "bert" else tiny_config(name, size)
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim >= 2 else 1)  # else all texts score nearly alike
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


PAIRS = [("2+2?", "4"), ("2+2?", " five, I think, or six"), ("2+2?", "4"), ("2+2?", "")]


def expected(folder, label):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer(p + c, return_tensors="pt")).logits[0, label]) for p, c in PAIRS]


@pytest.mark.parametrize("name, workers", [("qwen3", 0), ("qwen3", 1), ("bert", 0)])
def test_a_classifier_scores_groups(classifiers, name, workers):
    """As transformers' own logits text by text; in a real worker, under its memory limit."""
    how = {"folder": str(classifiers[name]), "label": 1, "batch_size": 3}
    cfg = Config(
        rewards={"model_reward": 1.0},
        reward_parameters={"model_reward": how},
        reward_workers=workers,
        reward_timeout_s=60.0,
    )
    inputs = [RewardInput(prompt, completion, [1], {}) for prompt, completion in PAIRS]
    with closing(open_rewards(cfg, print)) as pool:
        assert pool.rewards[0].sees_group and len(pool.rewards[0].source.splitlines()[-1]) == 64
        answers = answers_of(pool, inputs, [Call(0, (0, 1, 2, 3)), Call(0, (3, 2, 1, 0))])
    want = expected(classifiers[name], 1)
    assert answers[0].outcomes == pytest.approx(want, abs=1e-5) and len({round(score, 3) for score in want}) == 3
    assert answers[1].outcomes == answers[0].outcomes[::-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_several_classifiers_in_one_run(classifiers, workers):
    """Each is loaded when a worker starts, scores as it does alone, and has its weight, name and fingerprint."""
    folders = [str(classifiers["qwen3"]), str(classifiers["bert"])]
    names = {"model_reward@helpful": 0.25, "model_reward@harmless": 2.0}
    parameters = {name: {"folder": folder, "label": at} for at, (name, folder) in enumerate(zip(names, folders))}
    cfg = Config(rewards=names, reward_parameters=parameters, reward_workers=workers, reward_timeout_s=60.0)
    inputs = [RewardInput(prompt, completion, [1], {}) for prompt, completion in PAIRS]
    library.model.load_classifier.cache_clear()
    with closing(open_rewards(cfg, print)) as pool:
        loaded = library.model.load_classifier.cache_info().currsize
        found = answers_of(pool, inputs, [Call(k, (0, 1, 2, 3)) for k in (0, 1)])
        assert loaded == library.model.load_classifier.cache_info().misses == (0 if workers else 2)
        sources = {reward.source for reward in pool.rewards}
        assert [reward.weight for reward in pool.rewards] == [0.25, 2.0] and len(sources) == 2
        assert [reward.short for reward in pool.rewards] == ["model_reward.helpful", "model_reward.harmless"]
    for k, folder in enumerate(folders):
        assert found[k].outcomes == pytest.approx(expected(folder, k), abs=1e-5)
    assert found[0].outcomes != pytest.approx(found[1].outcomes, abs=1e-3)


def test_one_function_several_times():
    marks = {"start": "<a>", "end": "</a>"}
    names = {"numeric_reward@tagged": 1.0, "numeric_reward": 0.5}
    cfg = Config(rewards=names, reward_parameters={"numeric_reward@tagged": marks}, reward_workers=0)
    with closing(open_rewards(cfg, print)) as rewards:
        inputs = [RewardInput("q", "<a>4</a>", [1], {"answer": "4"})]
        found = answers_of(rewards, inputs, [Call(0, (0,)), Call(1, (0,))])
    assert [answer.outcomes for answer in found] == [[1.0], [0.0]]
    for wrong in ("numeric_reward@", "numeric_reward@a b", "numeric_reward@a@b"):
        with pytest.raises(UserError, match=r"behind @ stands a label"):
            open_rewards(Config(rewards={wrong: 1.0}, reward_workers=0), print)


def test_a_name_of_trl_is_answered_with_ours():
    for theirs in (name for name in BY_NAME if not hasattr(library, name)):
        with pytest.raises(UserError, match=re.escape(BY_NAME[theirs].advice())):
            open_rewards(Config(rewards={theirs: 1.0}, reward_workers=0), print)


def test_folders_that_are_no_classifier_are_refused(classifier, tmp_path):
    def error_of(folder, **how):
        parameters = {"model_reward": {"folder": str(folder), **how}}
        with pytest.raises(UserError) as caught:
            open_rewards(Config(rewards={"model_reward": 1.0}, reward_parameters=parameters, reward_workers=0), print)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "label must be a whole number from 0 to 1, got 2" in error_of(classifier, label=2)
    assert "max_length must be a whole number from 1 to 256" in error_of(classifier, max_length=300)
    assert "no such path" in error_of(tmp_path / "none")
    assert "score.weight is missing" in error_of(PROJECT / "demo" / "base")
    for file in classifier.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "its weights are a pickle (pytorch_model.bin), which could run code" in error_of(tmp_path)
