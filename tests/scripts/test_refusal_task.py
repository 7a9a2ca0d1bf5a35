"""The refusal benchmark's task: half of it cannot be known, and nothing but the name at the end says which half.

Counts are compared with what chance gives: 3,000 rows of fixed seeds, five standard deviations allowed.
"""

import itertools
import math
import re
from collections import Counter

import pytest

from benchmarks import refusal
from grpo.config.command_line import load_config
from grpo.data.questions import load_questions
from grpo.data.recipe import make_recipe
from tests.support.tiny import tiny_tokenizer

ROWS = list(itertools.islice(refusal.questions(seed=1, held_out=False, distinct=False), 6000))
TRAINED = list(itertools.islice(refusal.questions(seed=1, held_out=False), refusal.TRAIN_ROWS))


def parsed(row):
    """Who is told about, both numbers, the item, and who is asked for; read independently of the generator."""
    name, had, item, bought, asked, again = re.fullmatch(
        r"(\D\D)(\d)顆(.)，買(\d)顆。(..)幾顆(.)？", row["題目"]
    ).groups()
    assert item == again
    return name, int(had), int(bought), item, asked


def halves():
    known = [row for row in ROWS if parsed(row)[0] == parsed(row)[-1]]
    return known, [row for row in ROWS if parsed(row)[0] != parsed(row)[-1]]


def near(counts, total, share):
    """Each count is what chance gives, up to five standard deviations."""
    spread = 5 * math.sqrt(total * share * (1 - share))
    return all(abs(count - total * share) <= spread for count in counts)


def gold_of(row):
    return row[f"選項{row['正確答案']}"]


def test_it_is_made_the_same_again(tmp_path):
    for name in ("a.csv", "b.csv"):
        refusal.write_csv(tmp_path / name, refusal.questions(seed=7, held_out=True), 50)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    other = list(itertools.islice(refusal.questions(seed=8, held_out=True), 50))
    assert other != list(itertools.islice(refusal.questions(seed=7, held_out=True), 50))


def test_no_held_out_question_is_taught_or_trained_on():
    held_out = {row["題目"] for row in itertools.islice(refusal.questions(2, held_out=True), refusal.HELD_OUT_ROWS)}
    assert len(held_out) == 200 and sum(map(refusal.is_knowable, held_out)) == 100
    trained = {row["題目"] for row in TRAINED}
    assert len(trained) == 1600 and sum(map(refusal.is_knowable, trained)) == 800
    assert not held_out & trained
    taught = itertools.islice(refusal.questions(seed=1000, held_out=False, distinct=False), 20_000)
    assert not held_out & {row["題目"] for row in taught}


def test_half_of_it_cannot_be_known_and_the_other_half_is_told():
    known, unknown = halves()
    assert len(known) == len(unknown) == 3000
    assert all(refusal.is_knowable(row["題目"]) for row in known)
    assert not any(refusal.is_knowable(row["題目"]) for row in unknown)
    for row in known:
        _, had, bought, _, _ = parsed(row)
        assert int(gold_of(row)) == had + bought


def place_of_sum(row):
    _, had, bought, _, _ = parsed(row)
    return next(letter for letter in "ABCD" if int(row[f"選項{letter}"]) == had + bought)


def test_unknowable_golds_depend_on_nothing():
    """Neither on the letter, nor on where the sum of the numbers stands, nor on who is told about or asked for."""
    _, unknown = halves()
    letters = Counter(row["正確答案"] for row in unknown)
    assert set(letters) == set("ABCD") and near(letters.values(), 3000, 1 / 4)
    places = Counter((place_of_sum(row), row["正確答案"]) for row in unknown)
    assert len(places) == 16 and near(places.values(), 3000, 1 / 16)
    for part in (0, -1):
        pairs = Counter((parsed(row)[part], row["正確答案"]) for row in unknown)
        assert len(pairs) == 32 and near(pairs.values(), 3000, 1 / 32)


def test_no_other_mark_tells_the_halves_apart():
    """Names, numbers, items, options, letters and the shape are alike, whatever the two names are."""
    for half in halves():
        for counts, values in (
            (Counter(row["正確答案"] for row in half), 4),
            (Counter(map(place_of_sum, half)), 4),
            (Counter(parsed(row)[0] for row in half), 8),
            (Counter(parsed(row)[-1] for row in half), 8),
            (Counter(parsed(row)[3] for row in half), 12),
        ):
            assert len(counts) == values and near(counts.values(), 3000, 1 / values), counts
        sums = Counter((parsed(row)[1], parsed(row)[2]) for row in half)
        assert set(sums) == {(had, total - had) for total in (2, 3, 4, 5) for had in range(1, total)}
        assert all([row[f"選項{letter}"] for letter in "ABCD"] == ["2", "3", "4", "5"] for row in half)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The configuration, and its prompts for the first 40 rows."""
    data = tmp_path_factory.mktemp("refusal") / "train.csv"
    refusal.write_csv(data, iter(ROWS), 40)
    cfg, _ = load_config(
        [
            "--config",
            "configs/multiple_choice.yaml",
            "--model",
            "m",
            "--data",
            str(data),
            "--eval_split_size",
            "0",
            "--max_prompt_length",
            "1200",
        ]
    )
    tokenizer = tiny_tokenizer()
    return cfg, load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer).items


def test_it_loads_in_the_columns_of_the_configuration(asked):
    cfg, items = asked
    assert len(items) == 40
    for item, row in zip(items, ROWS[:40], strict=True):
        assert item.columns["answer"] == row["正確答案"] and item.columns["question"] == row["題目"]
        assert item.text == refusal.prompt_of(row, cfg.prompt_template)


def test_what_the_base_is_taught_earns_what_it_should():
    row = next(row for row in ROWS if row["正確答案"] == "B")
    texts = [refusal.answer_of(row, False), refusal.answer_of(row, True)]
    assert refusal.refusal_reward(texts, ["B", "B"], **refusal.PARAMETERS) == [1.0, 0.4]
    assert refusal.refusal_reward(texts, ["C", "C"], **refusal.PARAMETERS) == [0.0, 0.4]


def test_the_control_hands_out_the_same_rewards_regardless_of_whose():
    """Over many prompts a refusal gets each reward of its group equally often; alone, it gets its own."""
    row = next(row for row in ROWS if row["正確答案"] == "B")
    right, refused = refusal.answer_of(row, False), refusal.answer_of(row, True)
    group = [right, refused, "", ""]
    got = [refusal.shuffled_refusal_reward([f"prompt {i}"] * 4, group, ["B"] * 4) for i in range(2000)]
    assert all(sorted(scores) == [0.0, 0.0, 0.4, 1.0] for scores in got)
    of_refusal = Counter(scores[1] for scores in got)
    assert near([of_refusal[1.0], of_refusal[0.4]], 2000, 1 / 4)
    assert refusal.shuffled_refusal_reward(["p"], [refused], ["B"]) == [0.4]
