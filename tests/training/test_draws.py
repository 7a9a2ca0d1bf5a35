"""Which groups a step is trained on: rounds of drawing by hand, and the questions that rest."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.errors import UserError
from grpo.rewards.logged import Logs
from grpo.training.advantages import group_advantages
from grpo.training.difficulty import Difficulty
from grpo.training.draws import Draws, Stream
from grpo.training.metrics import MAXIMA, Tally
from grpo.training.minibatches import make_plan
from grpo.training.scoring import Scored
from grpo.types import FACTS, Completion, Counters, Prompt, Table

NEEDED = dict(model="m", data="d", rewards={"mark_reward": 1.0})
G = 2
VARIED, EQUAL = (1.0, 0.0), (1.0, 1.0)


class NoPolicy:
    """What a Stream needs of a policy."""

    world = None

    def __init__(self):
        self.extras = {}


@pytest.fixture(autouse=True)
def no_metrics_stay_declared():
    before = set(MAXIMA)
    yield
    MAXIMA.clear()
    MAXIMA.update(before)


def stream_of(num_questions=100, **settings):
    settings = {"filter_groups": "resample", "batch_size": 4, "gradient_accumulation_steps": 1} | settings
    cfg = Config(num_generations=G, **settings)
    return Stream(cfg, Questions([Prompt(i, f"q{i}", (i,), {}) for i in range(num_questions)], 0, seed=3), NoPolicy())


def round_of(rewards, K=1):
    """What a rank has of a round whose groups have these rewards: completions, scores, the table."""
    values = np.array(rewards, dtype=np.float64).ravel()
    completions = [Completion(n, np.array([n], np.int32), np.zeros(1, np.float32), "stop") for n in range(len(values))]
    scores = np.repeat(values[:, None], K, 1)
    logs = Logs()
    logs.add("r", [0], {"note": ["first"]}, {"m": [1.0]})
    facts = {name: np.ones(len(values)) for name in FACTS}
    scored = Scored(completions, [f"input {n}" for n in range(len(values))], scores, scores * 0, len(values), logs)
    return scored, Table(["r"] * K, scores, values, facts, G)


def drawn(stream, groups, place=0):
    """A step on a stream whose groups, in the stream's order, have these rewards."""
    source, draws, sizes = iter(groups), Draws(stream, place), []
    while draws.wanted:
        prompts, _ = draws.next_prompts()
        sizes.append(len(prompts))
        draws.add(prompts, *round_of(list(itertools.islice(source, len(prompts)))))
    return draws, sizes


def test_rounds_go_on_until_p_groups_are_kept_and_the_first_of_the_stream_are_kept():
    groups = [EQUAL, VARIED, EQUAL, EQUAL, VARIED, EQUAL, VARIED, EQUAL, VARIED, EQUAL, VARIED]
    draws, sizes = drawn(stream_of(), groups, place=8)
    assert sizes == [4, 4, 3]  # 1 of 4 kept: 12 more were likely needed, at most P; 3 of 8 kept: 1 / (3 / 8) needed
    assert draws.chosen == [1, 4, 6, 8] and draws.drawn == 19  # the surplus, group 10, is dropped
    assert draws.slots == list(range(8, 19))
    assert [p.data_row for p in draws.prompts] == [p.data_row for p in stream_of().questions.at(range(8, 19))]


def test_a_step_ends_after_max_rounds_with_the_groups_that_there_are():
    draws, sizes = drawn(stream_of(max_rounds=3), [EQUAL] * 4 + [VARIED] + [EQUAL] * 7)
    assert sizes == [4, 4, 4] and draws.chosen == [4]
    nothing, sizes = drawn(stream_of(max_rounds=2), [EQUAL] * 8)
    assert sizes == [4, 4] and nothing.chosen == [] and not nothing.advantages().any()


@pytest.mark.parametrize(("how", "chosen"), [("keep", [0, 1, 2, 3]), ("drop", [1, 3])])
def test_one_round_without_resampling(how, chosen):
    draws, sizes = drawn(stream_of(filter_groups=how), [EQUAL, VARIED, EQUAL, VARIED, VARIED])
    assert sizes == [4] and draws.chosen == chosen


def test_rows_count_over_all_rounds():
    draws, _ = drawn(stream_of(), [EQUAL, VARIED, EQUAL, VARIED, VARIED, EQUAL, VARIED, EQUAL])
    assert [c.row for c in draws.scored.completions] == list(range(16)) and draws.scored.num_rows == 16
    assert draws.scored.inputs[8] == "input 0" and draws.scored.scores.shape == (16, 1)
    assert draws.scored.logs.columns == {0: {"note": "first"}, 8: {"note": "first"}}
    assert draws.scored.logs.metrics == {"m": [1.0, 1.0]}
    assert draws.table.rewards.shape == draws.table.lengths.shape == (16,) and draws.table.faults.shape == (16, 1)


def test_the_denominators_count_the_chosen_groups_alone():
    draws, _ = drawn(stream_of(filter_groups="drop", num_minibatches=2), [VARIED, EQUAL, VARIED, VARIED])
    plan = make_plan(draws.cfg, draws.prompts, draws.table.lengths, draws.advantages(), 1, chosen=draws.chosen)
    assert [minibatch.rows for minibatch in plan] == [(0, 1), (4, 5, 6, 7)]
    kept = make_plan(draws.cfg, draws.prompts, draws.table.lengths, draws.advantages(), 1)
    assert [minibatch.rows for minibatch in kept] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_advantages_are_those_of_the_chosen_groups():
    """Also where the scale is that of all rows: dropped rows are not among them."""
    groups = [(3.0, 3.0), (1.0, 0.0), (5.0, 5.0), (4.0, 1.0), (9.0, 2.0), (7.0, 7.0), (7.0, 7.0), (1.0, 2.0)]
    rewards = np.array([groups[p] for p in (1, 3, 4, 7)])
    draws, _ = drawn(stream_of(), groups)
    assert draws.chosen == [1, 3, 4, 7]
    found = draws.advantages().reshape(8, G)
    assert np.array_equal(found[[1, 3, 4, 7]], group_advantages(rewards)) and not found[[0, 2, 5, 6]].any()
    batch, _ = drawn(stream_of(scale_rewards="batch"), groups)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-8)
    assert batch.advantages().reshape(8, G)[[1, 3, 4, 7]] == pytest.approx(expected)


def test_the_place_in_the_stream_is_noted_when_the_step_is_done():
    """A checkpoint that is written in the middle of a step must not contain it."""
    counters = Counters(drawn=0)
    draws, _ = drawn(stream_of(), [EQUAL] * 2 + [VARIED] * 9)
    assert counters.drawn == 0
    tally = Tally()
    draws.finish(counters, tally)
    assert counters.drawn == draws.drawn == 8  # a half was kept: 2 missing groups need 4 more prompts
    assert [tally.maxima[f"groups/{name}"] for name in ("drawn", "kept", "rounds")] == [8, 4, 2]


def test_a_question_rests_while_its_rate_is_beyond_the_range():
    difficulty = Difficulty(3, low=0.1, high=0.9, rest=2)
    for epoch, rate in ((0, 1.0), (3, 0.5)):
        difficulty.note(0, epoch, rate)
    assert difficulty.rates[0] == 0.75 and difficulty.resting_to[0] == 2  # rested in epochs 1 and 2
    difficulty.note(1, 0, 0.0)
    difficulty.note(2, 0, float("nan"))
    assert [difficulty.rests(q, 1) for q in range(3)] == [True, True, False] and difficulty.share_resting(2) == 2 / 3
    again = Difficulty(3, 0.1, 0.9, 2)
    again.load(difficulty.tensors())
    assert np.array_equal(again.rates, difficulty.rates, equal_nan=True)
    assert np.array_equal(again.resting_to, difficulty.resting_to)


@pytest.mark.parametrize(
    "change",
    [
        {"rates": torch.zeros(4)},
        {"rates": torch.zeros(3, dtype=torch.float64)},
        {"rates": torch.full((3,), torch.inf)},
        {"resting_to": torch.full((3,), -9)},
        {"resting_to": None},
    ],
)
def test_a_state_of_something_else_is_refused(change):
    difficulty = Difficulty(3, 0.1, 0.9, 1)
    tensors = {name: tensor for name, tensor in (difficulty.tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=r"questions|beyond"):
        difficulty.load(tensors)


def test_the_stream_passes_over_questions_that_rest():
    stream = stream_of(6, difficulty_range=[0.1, 0.9], batch_size=3, filter_groups="keep")
    draws, _ = drawn(stream, [EQUAL, VARIED, EQUAL])
    draws.finish(Counters(), Tally())
    rested = {draws.prompts[p].data_row for p in (0, 2)}
    others, slots = Draws(stream, 6).next_prompts()  # in the second epoch
    assert not rested & {prompt.data_row for prompt in others}
    assert len(others) == 3 and slots[0] >= 6
    draws_later = Draws(stream, 12)  # in the third one all take part again
    seen = [*draws_later.next_prompts()[0], *draws_later.next_prompts()[0]]
    assert {prompt.data_row for prompt in seen} == set(range(6))


def test_where_all_questions_rest_the_next_one_is_taken():
    stream = stream_of(3, difficulty_range=[0.1, 0.9], difficulty_rest=9, batch_size=2)
    stream.difficulty.resting_to[:] = 99
    prompts, slots = Draws(stream, 0).next_prompts()
    assert slots == [3, 7] and len(prompts) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_rounds": 1}, "max_rounds: must be >= 2, got 1. For one round say filter_groups drop."),
        ({"max_rounds": 3}, "max_rounds: it acts with filter_groups resample, got keep. Leave it out."),
        ({"difficulty_rest": 2}, "difficulty_rest: it needs difficulty_range, got 2. Leave it out."),
        ({"difficulty_range": [0.5]}, "difficulty_range: must be [low, high] with low < high, or null, got [0.5]."),
        ({"difficulty_range": [0.9, 0.1]}, "difficulty_range: must be [low, high] with low < high, or null, got"),
        ({"difficulty_rest": 0, "difficulty_range": [0.1, 0.9]}, "difficulty_rest: must be >= 1, got 0."),
    ],
)
def test_what_has_no_effect_is_refused(settings, said):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(Config(**NEEDED), **settings))
    assert str(error.value).startswith(said)
