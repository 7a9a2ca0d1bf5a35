"""A run that an older version began under other rules is refused by name, and only where the rule made a difference."""

import dataclasses
from pathlib import Path

import pytest

from grpo.checkpoints.fingerprints import fingerprints
from grpo.checkpoints.resume import check_same_run
from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.errors import UserError
from grpo.rewards import Reward

REWARD = Reward("f_reward", 1.0, source="def f_reward(): ...")
UNSCALED = [{"scale_rewards": "none"}, {"weighting": "dr_grpo"}]


def facts_of(cfg, rewards=(REWARD,)):
    return fingerprints(cfg, Questions([], 0), rewards, tokenizer=None)


def resume(cfg, without):
    """Resume what a version wrote that did not know the fact."""
    facts = facts_of(cfg)
    older = {name: value for name, value in facts.items() if name != without}
    check_same_run(Path("output/checkpoint_1"), {"config": dataclasses.asdict(cfg), **older}, cfg, facts)


@pytest.mark.parametrize("settings", UNSCALED)
def test_older_runs_clipped_unscaled_advantages(settings):
    """The control: a run that this version began goes on."""
    cfg = Config(model="m", **settings)
    with pytest.raises(UserError, match="clip_of_unscaled_advantages has changed"):
        resume(cfg, without="clip_of_unscaled_advantages")
    resume(cfg, without="nothing")


def test_runs_with_scaled_advantages_go_on():
    """They are clipped as before; supervised runs have no advantages."""
    assert "clip_of_unscaled_advantages" not in facts_of(Config(model="m"))
    assert "clip_of_unscaled_advantages" not in facts_of(Config(model="m", scale_rewards="none"), rewards=())
    resume(Config(model="m"), without="clip_of_unscaled_advantages")


@pytest.mark.parametrize("settings", UNSCALED)
def test_a_clip_without_effect_is_refused(settings):
    good = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}}
    check(Config(**good, advantage_clip=5.0))
    check(Config(**good, **settings))
    with pytest.raises(UserError, match=r"advantage_clip: it acts on .* got 5 with scale_rewards"):
        check(Config(**good, **settings, advantage_clip=5.0))
