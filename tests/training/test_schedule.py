"""The learning rate of every step: by hand, and beside transformers' own schedulers."""

import math

import pytest
import torch
from transformers import get_scheduler

from grpo.config.checks import check
from grpo.config.command_line import load_config, load_sft_config
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.training.schedule import SCHEDULES, learning_rate

GOOD = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}}


def test_by_hand():
    linear = Config(lr=1.0, lr_schedule="linear", warmup_ratio=0.1)
    assert [learning_rate(linear, i, 20) for i in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 1 / 18])
    cosine = Config(lr=1.0, lr_schedule="cosine", warmup_ratio=0.1)
    assert [learning_rate(cosine, i, 20) for i in (0, 1, 2, 11)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    least = Config(lr=2.0, lr_schedule="cosine_with_min_lr", min_lr_ratio=0.1, warmup_steps=4)
    assert [learning_rate(least, i, 20) for i in (0, 3, 4, 12)] == pytest.approx([0.5, 2.0, 2.0, 1.1])
    assert learning_rate(least, 10**6 - 1, 10**6) == pytest.approx(0.2)
    assert {learning_rate(Config(lr=1.0), i, 20) for i in range(20)} == {1.0}


def rates_of_transformers(name: str, warmup: int, total: int, **kwargs: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-6)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 1}, {"warmup_steps": 7}, {"warmup_ratio": 0.23}])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_that_of_transformers(name, warmup):
    """After the warmup the rates are equal; in it, ours are one step ahead, as the first one there is 0.

    Another formula of any of them differs in the middle of 29 steps, another meaning of warmup at its end.
    """
    least = {"min_lr_ratio": 0.15} if name == "cosine_with_min_lr" else {}
    cfg = Config(lr=3e-6, lr_schedule=name, **warmup, **least)
    total = 29
    w = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)
    theirs = rates_of_transformers(
        "constant_with_warmup" if name == "constant" and w else name,  # `constant` has no warmup there
        w,
        total,
        **({"min_lr_rate": 0.15} if least else {}),
    )
    ours = [learning_rate(cfg, j, total) for j in range(total)]
    assert ours[w:] == pytest.approx(theirs[w:], rel=1e-12)
    assert ours[:w] == pytest.approx([*theirs, cfg.lr][1 : w + 1], rel=1e-12)
    assert ours[0] > 0 and (w == 0 or theirs[0] == 0)


def test_a_warmup_longer_than_the_run_only_rises():
    cfg = Config(lr=1.0, lr_schedule="cosine", warmup_steps=10)
    assert [learning_rate(cfg, j, 3) for j in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps, warmup_ratio: set one, got 3 and 0.1"),
        ({"warmup_steps": -1}, "warmup_steps: must be >= 0"),
        ({"lr_schedule": "cosine_with_min_lr"}, "min_lr_ratio: must be above 0 with lr_schedule cosine_with_min_lr"),
        ({"lr_schedule": "cosine", "min_lr_ratio": 0.1}, "min_lr_ratio: must be above 0 with .* got 0.1 with cosine"),
        ({"lr_schedule": "cosine_with_min_lr", "min_lr_ratio": 1.0}, r"min_lr_ratio: must be in \[0, 1\)"),
        ({"lr_schedule": "constant_with_warmup"}, "constant_with_warmup needs warmup_steps or warmup_ratio"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(UserError, match=said):
        check(Config(**GOOD, **settings))


def test_the_section_of_the_supervised_stage_may_say_it_the_other_way(tmp_path):
    """Its warmup replaces both ways, and its schedule the share that belongs to another one."""
    file = tmp_path / "both.yaml"
    file.write_text(
        "model: m\ndata: d\nrewards: {mark_reward: 1}\nwarmup_ratio: 0.1\nlr_schedule: cosine_with_min_lr\n"
        "min_lr_ratio: 0.1\nsft: {solution_column: s, warmup_steps: 5, lr_schedule: linear}\n"
    )
    cfg, _ = load_config(["--config", str(file)])
    assert (cfg.warmup_ratio, cfg.warmup_steps, cfg.lr_schedule, cfg.min_lr_ratio) == (
        0.1,
        0,
        "cosine_with_min_lr",
        0.1,
    )
    stage, _ = load_sft_config(["--config", str(file)])
    assert (stage.warmup_ratio, stage.warmup_steps, stage.lr_schedule, stage.min_lr_ratio) == (0.0, 5, "linear", 0.0)
    file.write_text(file.read_text().replace("warmup_steps: 5, lr_schedule: linear", "epoch: 1"))
    stage, _ = load_sft_config(["--config", str(file)])
    assert (stage.warmup_ratio, stage.warmup_steps, stage.lr_schedule, stage.min_lr_ratio) == (
        0.1,
        0,
        "cosine_with_min_lr",
        0.1,
    )
