"""math_reward: each pair by hand, of a gold and an answer; what stands beside a pair is its score."""

import hashlib
import inspect
import json
from pathlib import Path

import pytest

import reward_func
from grpo.config.settings import Config
from grpo.rewards.gold_check import warn_of_unreadable_golds
from grpo.rewards.pool import InProcess, open_rewards

pytest.importorskip("math_verify")

SAME = [  # gold, answer: 1
    # expressions
    *[("2x+3", "3+2x"), ("x+y", "y+x"), ("x^2-1", "(x-1)(x+1)"), ("3x", "x*3"), ("2(x+1)", "2x+2"), ("2ab", "2ba")],
    *[("sin(x)", r"\sin x"), ("2√3", r"2\sqrt{3}"), ("2 sqrt(3)", r"$2\sqrt{3}$"), ("π/2", r"\frac{\pi}{2}")],
    *[("1/x", "x^{-1}"), ("e^x", r"\exp(x)"), ("5!", "120"), ("2^10", "1024"), ("10^-3", "0.001"), ("0.1+0.2", "0.3")],
    # equations, either side alone
    *[("x=5", "5"), ("5", "x = 5"), ("y=2x+1", "1+2x"), ("1450", "x=1,450"), ("x>3", "3<x"), ("x != 2", r"x \neq 2")],
    # fractions
    *[
        ("1/2", "0.5"),
        (r"\frac12", "1/2"),
        ("½", r"\dfrac{1}{2}"),
        ("2 1/2", "2.5"),
        ("2½", "5/2"),
        ("75%", r"\frac{3}{4}"),
    ],
    # numbers
    *[("1,450", "1450"), ("1{,}000", "$1,000$"), ("1234.5", "1,234.50"), ("1e3", "1000"), (r"1.2\times 10^3", "1200")],
    *[("-8", "−8"), ("(-8)", "- 8"), ("0", "-0"), ("12.", "12"), ("２５", "25"), ("$12", "12.00"), ("-$12", "$-12$")],
    # units and percents
    *[("5 km", "5"), ("5", r"5\text{ km}"), ("5 km", "5km"), ("5 kilometers", "5 km"), ("5 cm^2", "5 cm²")],
    *[("50%", "50"), ("50%", "0.5"), ("0.5", r"$50\%$"), ("12 percent", "12%"), ("90 degrees", r"90^{\circ}")],
    *[("2 million", "2,000,000"), ("5万", "50000"), ("3个", "3"), ("12 dollars", "$12"), ("3rd", "3")],
    # several
    *[("1, 2", "2, 1"), ("1 or 2", "$2$ and $1$"), ("x = 1 or x = -2", "$x=-2$, $x=1$"), ("{1, 2}", r"\{2,1\}")],
    *[("(1, 2) and (3, 4)", "(3,4), (1,2)"), ("[0,1)", "$[0, 1)$"), (r"(-\infty, 3]", "(-∞,3]"), ("A, B", "B, A")],
    # marks around it
    *[(r"\boxed{\frac{1}{2}}", "0.5"), ("3", r"so \boxed{4}, no, \boxed{3}"), (r"\[5\]", r"\(5\)"), ("$$5$$", "**5**")],
    # words that lead to it
    *[("12", "The answer is 12."), ("12", "It is 12"), ("3/4", "So we get 3/4"), ("12", "Answer: 12"), ("12", "= 12")],
    *[
        ("1200", "the total is 1,200 dollars"),
        ("5", "x is 5"),
        ("12", "The answer is $12$."),
        ("A", "(A)"),
        (r"\left(0,1\right)", "(0,1)"),
    ],
    # words
    *[
        ("listen", "Listen"),
        (r"\text{Evelyn}", "evelyn"),
        ("巴黎", "巴黎"),
        ("H2O", "H2O"),
        ("2024-01-05", "2024-01-05"),
    ],
]
DIFFERENT = [  # gold, answer: 0
    # a part of the answer, or more than it
    *[("x + 13", "13"), ("13", "x + 13"), ("$x+13$", "13"), ("2x", "2"), ("2", "2x"), ("2", "2xy"), ("2ab", "2")],
    *[("12", "It is 12 or 13"), ("12", "It is not 12"), ("12", "it is 10 and the rest are 12")],
    *[("12", "10 or 12"), ("12", "$10$ or $12$"), ("12", "10, 12"), ("12", "between 10 and 12"), ("12", "12 vs 13")],
    *[("12", "12 or more"), ("12", "not 12"), ("12", "±12"), ("12", "{10, 12}"), ("12", "(10, 12)"), ("12", "10 12")],
    *[("12", "x=10 or x=12"), ("12", "12 (or 10)"), ("12", r"\text{10 or 12}"), ("12", "10=12"), ("12", "$12$ $13$")],
    *[("12", "$12 and $15"), ("2x + 3 = 7", "x=2")],
    # words are not products of letters
    *[("listen", "silent"), ("$listen$", "$silent$"), ("cat", "act"), ("no", "on"), ("evil", "live"), ("CO2", "2CO")],
    *[("5", "five"), ("1st", "first"), ("巴黎", "伦敦"), (r"\text{yes}", r"\text{yse}")],
    # another value
    *[
        ("-8", "8"),
        ("1/3", "0.333"),
        (r"\sqrt{2}", "1.41"),
        ("50%", "5"),
        ("x=5", "x=6"),
        ("x=5", "y=5"),
        ("12,5", "12.5"),
    ],
    *[("5 km", "5 m"), ("3 dogs", "3 cats"), ("20 m/s", "20 km/h"), ("5 cm^2", "5 cm"), ("3个", "3只"), ("$12", "-12")],
    *[
        ("[0,1]", "(0,1)"),
        ("[0,1)", "[0,1]"),
        ("(1,2)", "(2,1)"),
        ("{1,2}", "{1,3}"),
        ("x>3", "y>3"),
        ("(1,234)", "1234"),
    ],
    *[("2024-01-05", "2018"), ("10^3", "10"), ("12", ""), ("12", "?")],
]
UNREADABLE = ["", "?", "???", "5 +", "1.000.000", "5 apples and 3 pears", "$12 and $15", r"0.\overline{3}", "x" * 3000]


def score(gold, answer):
    [value] = reward_func.math_reward([f"<answer>{answer}</answer>"], [gold])
    return value


@pytest.mark.parametrize("gold, answer", SAME)
def test_equal_answers(gold, answer):
    """Either way round."""
    assert score(gold, answer) == 1.0 and score(answer, gold) == 1.0


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_other_answers(gold, answer):
    """The control: the gold itself is right."""
    assert score(gold, answer) == 0.0 and score(gold, gold) == 1.0


@pytest.mark.parametrize("gold", UNREADABLE)
def test_a_gold_that_cannot_be_read_has_no_score(gold):
    assert score(gold, "5") is None


def questions(*golds):
    return [{"answer": gold} for gold in golds]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_golds_are_counted_before_training(capsys, workers):
    """An expression is no number; a function without the mark is not asked."""
    cfg = Config(rewards={"math_reward": 1.0, "numeric_reward": 1.0, "mark_reward": 1.0}, reward_workers=workers)
    rewards = open_rewards(cfg, print)
    warn_of_unreadable_golds(rewards, questions("12", "???", "2x+3", "5 +", "5 km"))
    rewards.close()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: math_reward cannot read 2 of 5 gold answers, such as '???', '5 +': their completions get no score "
        "from it.",
        "warning: numeric_reward cannot read 3 of 5 gold answers, such as '???', '2x+3', '5 +': their completions get "
        "no score from it.",
    ]


def test_readable_golds_are_not_mentioned(capsys):
    rewards = InProcess.of({"numeric_reward": reward_func.numeric_reward})
    warn_of_unreadable_golds(rewards, questions("12", "1,450"))
    warn_of_unreadable_golds(rewards, [])
    assert capsys.readouterr().err == ""


def test_a_run_that_used_the_old_rule_is_not_resumed():
    """What commit 3865586 hashed is not what a run hashes today, so `reward_source has changed` (see there)."""
    old = "f373f5aea2f518cf"
    now = hashlib.sha256(inspect.getsource(reward_func.math_reward).encode()).hexdigest()[:16]
    kept = Path(__file__).parents[1] / "checkpoints" / "written_by_3865586" / "expected.json"
    assert now != old and json.loads(kept.read_text())["reward_sources"]["math_reward"] == now
