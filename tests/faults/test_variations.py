"""Every variation of the algorithm, on whole runs: the same bits for any number of ranks, and after a kill.

Four updates a step, so that ratios are not 1. The control: no two variations end alike.
"""

import itertools

import pytest

from grpo.config.algorithm import PRESETS
from tests.faults.fault import Fault
from tests.support.tiers import sampled, short

BASE = {"num_iterations": 2, "num_minibatches": 2, "max_steps": 6, "deterministic": True}
VARIATIONS = {
    **{name: {"algorithm": name} for name in PRESETS},
    "dual clip": {"clip_eps": 0.02, "clip_ratio_max": 1.05},
    "sequence_token": {"ratio": "sequence_token", "clip_eps": 0.002},
    "reinforce": {"surrogate": "reinforce"},
    "k2": {"beta": 0.1, "kl_estimator": "k2"},
    "k3_weighted": {"beta": 0.1, "kl_estimator": "k3_weighted"},
    "masked": {"truncated": "mask", "max_generate_length": 7},
    "gmpo": {"surrogate": "gmpo", "clip_eps": 0.01},
    "k1_reward": {"beta": 0.1, "kl_estimator": "k1_reward"},
    "renewed reference": {"beta": 0.1, "reference_sync_steps": 2, "reference_mixup": 0.5},
    "off-policy rows": {"off_policy_threshold": 1e-4},
    "top entropies": {"top_entropy_share": 0.4, "entropy_coef": 0.05},
    "adaptive entropy": {"entropy_target": 6.0, "entropy_coef_step": 0.1},
    "difficulty": {"difficulty_range": "[0.3, 0.7]"},
    "rewards of two functions": {"normalize_each_reward": True},
}
SHORT = sampled(sorted(VARIATIONS), 3, seed=17)


@pytest.fixture(scope="module")
def settings(arena):
    """Two rewards, coarse ones, so that advantages of groups and of the batch differ."""
    (arena.folder / "two.py").write_text(
        "def even(completions, **columns):\n    return [float(sum(map(ord, text)) % 2) for text in completions]\n\n\n"
        "def long(completions, **columns):\n    return [len(text) / 9 for text in completions]\n"
    )
    return {"rewards": {f"{arena.folder}/two.py:{name}": weight for name, weight in (("even", 1.0), ("long", 0.5))}}


@pytest.fixture(scope="module")
def endings(arena, settings):
    """endings(name): of the uninterrupted run on two ranks. Done once."""
    found = {}

    def of(name):
        if name not in found:
            run = arena.run(**settings, **BASE | VARIATIONS[name])
            run.finish()
            found[name] = run.ending()
        return found[name]

    return of


@pytest.mark.parametrize("name", short(VARIATIONS, SHORT))
def test_the_number_of_ranks_changes_nothing(arena, settings, endings, name):
    for world in (1, 3):
        run = arena.run(world=world, **settings, **BASE | VARIATIONS[name])
        run.finish()
        assert run.ending().weights == endings(name).weights, world


@pytest.mark.parametrize("name", short(VARIATIONS, SHORT))
def test_killed_and_resumed_ends_with_the_same_bits(arena, settings, endings, name):
    run = arena.run(**settings, **BASE | VARIATIONS[name])
    run.launch([Fault("kill9", "update", None, 5)]).wait()
    assert run.valid() == [3]
    run.finish()
    assert run.ending().differences(endings(name)) == []


@pytest.mark.full
def test_no_two_variations_end_alike(endings):
    same = [
        pair for pair in itertools.combinations(VARIATIONS, 2) if endings(pair[0]).weights == endings(pair[1]).weights
    ]
    assert same == []
