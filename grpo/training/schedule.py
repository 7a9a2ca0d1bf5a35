"""The learning rate of each optimizer step: a linear warmup, then one of the schedules below.

    rate(j) = lr (j + 1) / w             of the first w steps, j from 0
    rate(w + k) = lr f(k / m)            of the m steps that follow

The schedules are those of transformers' optimization.py. Its warmup begins at a rate of 0, so there the rate of step j
is the one that step j - 1 has here, and the first step trains nothing; after the warmup the rates are equal.
"""

import math
from collections.abc import Callable

from grpo.config.settings import Config

SCHEDULES: dict[str, Callable[[float, float], float]] = {  # f of progress p in [0, 1], and min_lr_ratio
    "constant": lambda p, least: 1.0,
    "constant_with_warmup": lambda p, least: 1.0,
    "linear": lambda p, least: 1 - p,
    "cosine": lambda p, least: 0.5 * (1 + math.cos(math.pi * p)),
    "cosine_with_min_lr": lambda p, least: least + (1 - least) * 0.5 * (1 + math.cos(math.pi * p)),
}


def learning_rate(cfg: Config, update: int, total_updates: int) -> float:
    """Rate of optimizer step `update`, from 0.

    >>> [learning_rate(Config(lr=18.0, lr_schedule="linear", warmup_ratio=0.1), update, 20) for update in (0, 1, 2, 19)]
    [9.0, 18.0, 18.0, 1.0000000000000004]
    """
    warmup = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total_updates)
    if update < warmup:
        return cfg.lr * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    return cfg.lr * SCHEDULES[cfg.lr_schedule](progress, cfg.min_lr_ratio)
