"""Steps that draw in several rounds: the same groups for any number of ranks, whoever is slow, and after a kill."""

import pytest

from tests.faults.fault import Fault

COARSE = '''"""Groups of four are often all right or all wrong."""


def score(completions, **columns):
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]
'''


@pytest.fixture(scope="module")
def settings(arena):
    (arena.folder / "coarse.py").write_text(COARSE)
    return {
        "rewards": {f"{arena.folder}/coarse.py:score": 1.0},
        "filter_groups": "resample",
        "max_rounds": 3,
        "difficulty_range": "[0.05, 0.95]",
        "num_minibatches": 2,
        "deterministic": True,
    }


@pytest.fixture(scope="module")
def whole(arena, settings):
    """The uninterrupted run on two ranks."""
    run = arena.run(**settings)
    run.finish()
    return run, run.ending()


def steps_with(run, rounds):
    return [line["step"] for line in run.metrics() if line["groups/rounds"] == rounds]


def test_steps_took_several_rounds_and_some_questions_rested(whole):
    run, _ = whole
    lines = run.metrics()
    assert steps_with(run, 2) or steps_with(run, 3)
    assert any(line["groups/drawn"] > 3 for line in lines)
    assert all(line["groups/kept"] == 3 for line in lines if line["groups/rounds"] < 3)
    assert any(line["questions/resting"] > 0 for line in lines)


@pytest.mark.parametrize("world", [1, 3])
def test_the_number_of_ranks_changes_nothing(arena, settings, whole, world):
    run = arena.run(world=world, **settings)
    run.finish()
    theirs = run.ending()
    assert (theirs.weights, theirs.counters) == (whole[1].weights, whole[1].counters)


def test_a_slow_rank_changes_nothing(arena, settings, whole):
    """The other one samples nearly all of a round, and is finished first."""
    run = arena.run(**settings)
    run.finish(faults=[Fault("sleep", "rollout", 1, None, value=0.2, times=6)])
    assert run.ending().differences(whole[1]) == []


@pytest.mark.parametrize("phase", ["rollout", "exchange"])
@pytest.mark.parametrize("kind", ["kill9", "term"])
def test_ended_in_the_middle_of_a_second_round(arena, settings, whole, kind, phase):
    """The step is drawn again from where it began, although its first round had moved on in the stream."""
    step = next(step for step in sorted({*steps_with(whole[0], 2), *steps_with(whole[0], 3)}) if step > 3)
    run = arena.run(**settings)
    run.launch([Fault(kind, phase, None if kind == "kill9" else 1, step, after=1)]).wait()
    # a signal at the exchange may arrive when the notices are written already: then the step ends first
    saved = step - 1 if kind == "term" else (step - 1) // 3 * 3
    assert run.valid()[0] in ((saved, step) if (kind, phase) == ("term", "exchange") else (saved,))
    run.finish()
    assert run.ending().differences(whole[1]) == []
