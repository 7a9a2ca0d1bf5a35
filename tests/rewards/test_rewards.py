"""Reward functions: how they are called, what happens when they misbehave. The library: test_reward_library.py."""

import contextlib
import datetime
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reward_func
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.rewards import Failure, RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import InProcess, open_rewards
from grpo.rewards.protocol import Splitter, cut, dump, frame, load
from grpo.training.rollout_metrics import rollout_metrics
from grpo.training.scoring import FAILED, LATE, Scoring, check_failures, combine
from grpo.types import FACTS, Completion, Prompt, Table
from tests.support.asking_rewards import answers_of
from tests.support.tiny import tiny_tokenizer

THREE = Config(num_generations=3)
SHIPPED = ["final_answer_reward", "correctness_reward", "digit_reward", "hard_format_reward", "mark_reward"]


@given(st.text(), st.text(min_size=1))
def test_any_text_gets_a_finite_score(text, gold):
    for name in SHIPPED:
        [value] = getattr(reward_func, name)(completions=[text], answer=[gold])
        assert math.isfinite(value) and 0 <= value <= 2


def input_of(text="hi", **columns):
    return RewardInput("question", text, [1, 2], {"answer": "4", **columns})


def one(function, **how):
    """The outcome of one call, in this process."""
    [answer] = answers_of(InProcess.of({"f": function}), [input_of(**how)], [Call(0, (0,))])
    return answer.outcomes[0]


def test_functions_get_prompts_completions_ids_and_columns():
    seen = {}

    def function(prompts, completions, completion_ids, answer, level, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, level=level)
        return [1]

    assert one(function, level=3) == 1.0
    assert seen == {"prompts": ["question"], "completions": ["hi"], "ids": [[1, 2]], "answer": ["4"], "level": [3]}


def test_none_means_not_applicable():
    assert one(lambda completions, **columns: [None]) is None


def exits(**columns):
    raise ValueError("no such key")


MISBEHAVIOUR = {
    "exception": (exits, "ValueError: no such key"),
    "nan": (lambda **c: [float("nan")], "finite"),
    "inf": (lambda **c: [float("inf")], "finite"),
    "wrong length": (lambda **c: [1.0, 2.0], "returned 2 scores for 1"),
    "bare number": (lambda **c: 1.0, "returned float"),
    "text": (lambda **c: ["good"], "'good'"),
    "string": (lambda **c: "1", "returned str"),
    "none": (lambda **c: None, "returned NoneType"),
    "too large": (lambda **c: [1e308], "between -1e+100 and 1e+100"),
    "huge integer": (lambda **c: [10**400], "expected a number or None"),
    "array of arrays": (lambda **c: np.zeros((1, 2)), "expected a number or None"),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_misbehaviour_is_reported_with_name_and_completion(kind):
    function, expected = MISBEHAVIOUR[kind]
    reason = one(function, text="the culprit")
    assert isinstance(reason, str) and expected in reason
    shown = str(Failure("f", reason, input_of("the culprit")))
    assert expected in shown and "reward f " in shown and "the culprit" in shown


@pytest.mark.parametrize(
    "score, value", [(True, 1.0), (np.float32(0.5), 0.5), (np.int64(2), 2.0), ("2", 2.0), (1e100, 1e100), (-3, -3.0)]
)
def test_what_counts_as_a_number(score, value):
    assert one(lambda **c: [score]) == one(lambda **c: (score,)) == value
    assert one(lambda **c: np.array([score], dtype=object)) == value


def test_combine_ignores_what_does_not_apply():
    scores = np.array([[1.0, 2.0], [1.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(combine(scores, [0.5, 2.0]), [4.5, 0.5, np.nan])


def test_weights_of_the_four_tagged_rules_sum_to_three_and_a_half():
    perfect = "<think>\n9*8=72, +1\n</think>\n<answer>\n73\n</answer>\n"
    assert sum(getattr(reward_func, name)(completions=[perfect], answer=["73"])[0] for name in SHIPPED[1:]) == 3.5


def completions(num, group):
    prompts = [Prompt(p, f"q{p}", (1,), {"answer": "4"}) for p in range(num // group)]
    rows = [Completion(n, np.array([5 + n], np.int32), np.zeros(1, np.float32), "stop") for n in range(num)]
    return prompts, rows


def test_calls_are_single_rows_or_whole_groups_in_order():
    calls: dict[str, list] = {"single": [], "group": []}

    def single(prompts, completions, **columns):
        calls["single"].append(prompts)
        return [0.0] * len(completions)

    def group(prompts, completion_ids, **columns):
        calls["group"].append((prompts, completion_ids))
        return [float(i) for i in range(len(prompts))]

    group.sees_group = True
    prompts, rows = completions(6, 3)
    rows = [rows[i] for i in (4, 0, 2, 5, 1, 3)]  # sample order must not depend on the order of arrival
    scored = Scoring(THREE, InProcess.of({"s": single, "g": group}), prompts, tiny_tokenizer(), print).finish(rows)
    assert sorted(calls["single"]) == [["q0"]] * 3 + [["q1"]] * 3
    assert sorted(calls["group"]) == [(["q0"] * 3, [[5], [6], [7]]), (["q1"] * 3, [[8], [9], [10]])]
    assert scored.scores[:, 1].tolist() == [1.0, 0.0, 2.0, 2.0, 1.0, 0.0]


def test_failures_are_counted_per_completion_and_reported_three_times_a_function():
    reported: list[str] = []
    prompts, rows = completions(6, 3)
    both = InProcess.of({"bad": exits, "fine": lambda completions, **columns: [1.0], "worse": lambda **columns: None})
    scored = Scoring(THREE, both, prompts, tiny_tokenizer(), reported.append).finish(rows)
    assert scored.faults.tolist() == [[FAILED, 0.0, FAILED]] * 6
    assert np.isnan(scored.scores[:, [0, 2]]).all() and (scored.scores[:, 1] == 1).all()
    assert [line.split()[1] for line in reported] == ["bad"] * 3 + ["worse"] * 3


def test_a_request_to_stop_is_no_failure():
    prompts, rows = completions(6, 3)
    beats = iter([False, False, True, True])
    one_only = InProcess.of({"fine": lambda completions, **columns: [1.0]})
    scored = Scoring(THREE, one_only, prompts, tiny_tokenizer(), print, lambda: next(beats)).finish(rows)
    assert np.isnan(scored.scores[:, 0]).tolist() == [False] * 2 + [True] * 4 and not scored.faults.any()


def test_too_many_failures_of_one_function_stop_the_run():
    cfg = Config(max_reward_failures=0.2)
    faults = np.zeros((10, 2))
    faults[:2] = FAILED  # of each function, as many as are allowed
    check_failures(cfg, faults, ["f", "my.py:g"])
    faults[2, 1] = LATE
    with pytest.raises(UserError, match=r"my.py:g failed on 3 of 10 completions in one step, 1 of them without"):
        check_failures(cfg, faults, ["f", "my.py:g"])


def test_failures_and_timeouts_are_metrics():
    facts = {name: np.ones(4) for name in FACTS}
    faults = np.array([[0.0], [FAILED], [LATE], [LATE]])
    table = Table(["my.py:g"], np.ones((4, 1)), np.ones(4), facts, 2, faults=faults)
    metrics = rollout_metrics(table, np.ones(4), 10)
    assert (metrics["reward/g/failures"], metrics["reward/g/timeouts"]) == (0.75, 0.5)


# --- values sent to a worker and back


NO_FOLD = (st.datetimes() | st.times()).map(lambda when: when.replace(fold=0))
TIMES = NO_FOLD | st.dates() | st.timedeltas()
NUMBERS = st.integers(-(10**30), 10**30) | st.floats() | st.decimals(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TIMES | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
@example({"\0date": ""})  # a column that looks like a tag
def test_columns_arrive_as_they_were(value):
    assert repr(load(dump(value))) == repr(value)  # repr: NaN is not equal to itself, -0.0 is to 0.0


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 7))
def test_frames_survive_any_cutting(parts, size):
    stream = b"".join(map(frame, parts))
    splitter, found = Splitter(40), []
    for at in range(0, len(stream), size):
        splitter.feed(stream[at : at + size])
        while (one_more := splitter.next()) is not None:
            found.append(one_more)
    assert found == parts == cut(stream)


def test_frames_have_a_longest():
    splitter = Splitter(3)
    splitter.feed(frame(b"four"))
    with pytest.raises(ValueError, match="4 bytes, allowed are 3"):
        splitter.next()


MINE = """
import datetime
from decimal import Decimal


def column_reward(completions, when, price, blob, **columns):
    fine = isinstance(when[0], datetime.datetime) and price[0] == Decimal("0.10") and blob[0] == b"x"
    blob.clear()
    return [float(fine)]


def array_reward(completions, **columns):
    import numpy
    return numpy.array([len(text) for text in completions])


def spread_reward(completions, **columns):
    return [0] * len(completions)


spread_reward.sees_group = True
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_by_name_and_by_file_and_calling(mine, workers):
    names = {"mark_reward": 0.5, f"{mine}:column_reward": 2.0, f"{mine}:array_reward": 1.0}
    rich = input_of(when=datetime.datetime(2024, 1, 2), price=Decimal("0.10"), blob=b"x")
    with contextlib.closing(open_rewards(Config(rewards=names, reward_workers=workers), print)) as pool:
        assert [(reward.short, reward.weight) for reward in pool.rewards] == [
            ("mark_reward", 0.5),
            ("column_reward", 2.0),
            ("array_reward", 1.0),
        ]
        assert pool.rewards[0].source.startswith("def mark_reward(")
        calls = [Call(0, (0,)), Call(1, (0,)), Call(2, (0,)), Call(1, (0,))]
        answers = [answer.outcomes for answer in answers_of(pool, [rich], calls)]
    assert answers == [[0.0], [1.0], [2.0], [1.0]]


def test_a_column_that_cannot_be_sent_fails_its_own_completion(mine):
    inputs = [input_of("ab"), input_of("abc", picture=object()), input_of("abcd")]
    with contextlib.closing(open_rewards(Config(rewards={f"{mine}:array_reward": 1.0}), print)) as pool:
        answers = [a.outcomes[0] for a in answers_of(pool, inputs, [Call(0, (i,)) for i in range(3)])]
    assert answers == [2.0, "a value of type object cannot be passed to a reward worker", 4.0]


@pytest.mark.parametrize(
    "name, error",
    [
        ("mork_reward", "has no function 'mork_reward'. The nearest of its [0-9]+: mark_reward, "),
        ("nope.py:f", "no such file 'nope.py'"),
    ],
)
def test_unknown_rewards_are_refused(name, error):
    with pytest.raises(UserError, match=error):
        open_rewards(Config(rewards={name: 1.0}), print)


def test_group_rewards_need_whole_groups_in_a_chunk(mine):
    names = {f"{mine}:spread_reward": 1.0}
    with contextlib.closing(
        open_rewards(Config(rewards=names, num_generations=8, rollout_chunk_rows=8), print)
    ) as pool:
        assert pool.rewards[0].sees_group
        [answer] = answers_of(pool, [input_of(), input_of()], [Call(0, (0, 1))])
        assert answer.outcomes == [0.0, 0.0]
    with pytest.raises(UserError, match="sees whole groups of 8"):
        open_rewards(Config(rewards=names, num_generations=8, rollout_chunk_rows=7), print)


REFUSING = """
def own_reward(completions, refuse=0.25, marker="-", **columns):
    return [refuse if text == marker else 0.0 for text in completions]


def other_reward(completions, refuse=0.25, **columns):
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_worth_of_a_refusal_comes_from_the_function_or_the_settings(tmp_path, workers):
    file = tmp_path / "mine.py"
    file.write_text(REFUSING)
    names = ["refusal_reward", f"{file}:own_reward", f"{file}:other_reward", "mark_reward"]
    for own, expected in (({}, [0.4, 0.25, 0.0, 0.0]), ({"refuse": 0.5}, [0.5, 0.5, 0.5, 0.0])):
        parameters = {name: own for name in names[:3]}
        cfg = Config(rewards=dict.fromkeys(names, 1.0), reward_parameters=parameters, reward_workers=workers)
        with contextlib.closing(open_rewards(cfg, print)) as rewards:
            assert [reward.worth_of_refusal for reward in rewards.rewards] == expected
