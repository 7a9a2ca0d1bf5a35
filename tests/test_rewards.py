"""Reward functions: golden rows, how they are called, what happens when they misbehave."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward_func
from grpo.config import Config
from grpo.errors import UserError
from grpo.rewards import Reward, Sample, call, combine, load_rewards
from grpo.scoring import check_failures, score
from grpo.types import Completion, Prompt
from tests.tiny import tiny_tokenizer

GOLDEN = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "reward_golden_001.jsonl").read_text().splitlines()
]
SHIPPED = ["final_answer_reward", "correctness_reward", "digit_reward", "hard_format_reward", "mark_reward"]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['reward']}-{row['completion'][:12]!r}")
def test_golden_rows(row):
    function = getattr(reward_func, row["reward"])
    assert function(completions=[row["completion"]], answer=[row["answer"]]) == [row["score"]]
    as_message = [{"role": "assistant", "content": row["completion"]}]
    assert function(completions=[as_message], answer=[row["answer"]], prompts=["?"]) == [row["score"]]


def test_golden_rows_are_all_there():
    assert len(GOLDEN) == 52 and len({row["score"] for row in GOLDEN}) > 4


@given(st.text(), st.text(min_size=1))
def test_any_text_gets_a_finite_score(text, gold):
    for name in SHIPPED:
        [value] = getattr(reward_func, name)(completions=[text], answer=[gold])
        assert math.isfinite(value) and 0 <= value <= 2


def sample(text="hi", **columns):
    return Sample("question", text, [1, 2], {"answer": "4", **columns})


def one(function, **how):
    return call(Reward("f", 1.0, function), [sample(**how)])


def test_functions_get_prompts_completions_ids_and_columns():
    seen = {}

    def function(prompts, completions, completion_ids, answer, level, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, level=level)
        return [1]

    assert one(function, level=3) == ([1.0], [])
    assert seen == {"prompts": ["question"], "completions": ["hi"], "ids": [[1, 2]], "answer": ["4"], "level": [3]}


def test_none_means_not_applicable():
    values, failures = one(lambda completions, **columns: [None])
    assert math.isnan(values[0]) and failures == []


def exits(**columns):
    raise ValueError("no such key")


@pytest.mark.parametrize(
    "function, said",
    [
        (exits, "ValueError: no such key"),
        (lambda **c: [float("nan")], "finite"),
        (lambda **c: [float("inf")], "finite"),
        (lambda **c: [1.0, 2.0], "returned 2 scores for 1"),
        (lambda **c: 1.0, "returned float"),
        (lambda **c: ["good"], "'good'"),
        (lambda **c: "1", "returned str"),
    ],
    ids=["exception", "nan", "inf", "wrong length", "bare number", "text", "string"],
)
def test_misbehaviour_is_reported_with_name_and_sample(function, said):
    values, [failure] = one(function, text="the culprit")
    assert math.isnan(values[0])
    assert said in str(failure) and "reward f " in str(failure) and "the culprit" in str(failure)


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
    scored = score([Reward("s", 1, single), Reward("g", 1, group)], prompts, rows, 3, tiny_tokenizer(), False, print)
    assert sorted(calls["single"]) == [["q0"]] * 3 + [["q1"]] * 3
    assert sorted(calls["group"]) == [(["q0"] * 3, [[5], [6], [7]]), (["q1"] * 3, [[8], [9], [10]])]
    assert scored.scores[:, 1].tolist() == [1.0, 0.0, 2.0, 2.0, 1.0, 0.0]


def test_failures_are_counted_per_completion_and_reported_three_times():
    said: list[str] = []
    prompts, rows = completions(6, 3)
    scored = score([Reward("bad", 1, exits)], prompts, rows, 3, tiny_tokenizer(), False, said.append)
    assert scored.failed.tolist() == [1.0] * 6 and np.isnan(scored.scores).all() and len(said) == 3


def test_too_many_failures_stop_the_run():
    cfg = Config(max_reward_failures=0.2)
    check_failures(cfg, 2, 10, ["f"])
    with pytest.raises(UserError, match="3 of 10 calls of f failed"):
        check_failures(cfg, 3, 10, ["f"])


def test_loading_by_name_and_by_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short_reward(completions, **columns):\n    return [len(c) for c in completions]\n")
    [ours, theirs] = load_rewards(Config(rewards={"mark_reward": 0.5, f"{file}:short_reward": 2.0}))
    assert ours.function is reward_func.mark_reward and ours.weight == 0.5
    assert call(theirs, [sample("abc")])[0] == [3.0]


@pytest.mark.parametrize(
    "name, said",
    [
        ("nope_reward", "has no function 'nope_reward'. It has: correctness_reward"),
        ("nope.py:f", "no such file 'nope.py'"),
    ],
)
def test_unknown_rewards_are_refused(name, said):
    with pytest.raises(UserError, match=said):
        load_rewards(Config(rewards={name: 1.0}))


def test_group_rewards_need_whole_groups_in_a_chunk(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def spread_reward(completions, **columns):\n    return [0] * len(completions)\n\n\n"
                    "spread_reward.sees_group = True\n")  # fmt: skip
    names = {f"{file}:spread_reward": 1.0}
    assert load_rewards(Config(rewards=names, num_generations=8, rollout_chunk_rows=8))[0].sees_group
    with pytest.raises(UserError, match="sees whole groups of 8"):
        load_rewards(Config(rewards=names, num_generations=8, rollout_chunk_rows=7))
