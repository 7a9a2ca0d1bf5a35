"""Advantages with another baseline or scale than advantages.py has.

    baseline leave_one_out   r_g - mean of the other r of its group    RLOO, arXiv 2402.14740
    baseline batch           r_n - mean over all rows                  REINFORCE++, arXiv 2501.03262, with scale batch
    scale batch              divided by the standard deviation of all rows' rewards
    normalize_each_reward    each function's scores centred and scaled in their group, before the weighted sum
                                                                       GDPO, arXiv 2601.05242, with both of batch

With the setting `advantage` all of this is a function of the user's own (user_table_functions.py).

With baseline batch a group whose rewards are all equal has an advantage, unless all rows are equal. Rounding, floors
and clipping are those of advantages.py.
"""

import numpy as np

from grpo.config.settings import Config, scales_advantages
from grpo.training.advantages import STD_EPS, STD_FLOOR, equal_groups
from grpo.training.user_table_functions import own_advantages
from grpo.types import Table


def other_advantages(table: Table, cfg: Config) -> np.ndarray:
    """[P, G] advantages of a step by `advantage`, or `baseline`, `scale_rewards` and `normalize_each_reward`."""
    if cfg.advantage is not None:
        return own_advantages(table, cfg)
    rewards = table.grouped
    if cfg.normalize_each_reward:
        scores = normalize_each(table.scores.reshape(*rewards.shape, -1))
        total = np.where(np.isnan(scores), 0.0, scores) @ np.array(table.reward_weights)
        rewards = np.where(np.isnan(rewards), np.nan, total)
    scale = str(cfg.scale_rewards) if scales_advantages(cfg) else "none"
    return advantages_from(cfg.baseline, scale, rewards, cfg.advantage_clip)


def advantages_from(baseline: str, scale: str, rewards: np.ndarray, clip: float = 10.0) -> np.ndarray:
    """[P, G] rewards, NaN where a row has none -> [P, G] float64 advantages, 0 where a row has none.

    >>> advantages_from("leave_one_out", "none", np.array([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred, count = _centred(rewards)
    _, std = _centred_and_std(rewards.reshape(1, -1) if scale == "batch" else rewards)
    if baseline == "batch":
        centred = _centred(rewards.reshape(1, -1))[0].reshape(rewards.shape)
    elif baseline == "leave_one_out":
        centred = centred * count / np.maximum(count - 1, 1)
    if scale != "none":
        centred = np.where(std < STD_FLOOR, 0.0, centred / (std + STD_EPS)).clip(-clip, clip)
    equal = equal_groups(rewards.reshape(1, -1) if baseline == "batch" else rewards)
    return np.where(equal[:, None], 0.0, centred)


def normalize_each(scores: np.ndarray) -> np.ndarray:
    """[P, G, K] scores, NaN where a function gave none -> the same, centred and scaled in each group and function.

    >>> normalize_each(np.array([[[3.0, 5.0], [1.0, 5.0]]])).round(3).tolist()
    [[[0.707, 0.0], [-0.707, 0.0]]]
    """
    groups = np.moveaxis(scores, 2, 1)  # [P, K, G]
    centred, std = _centred_and_std(groups.reshape(-1, groups.shape[2]))
    scaled = np.where(std < STD_FLOOR, 0.0, centred / (std + STD_EPS)).reshape(groups.shape)
    return np.moveaxis(np.where(np.isnan(groups), np.nan, scaled), 1, 2)


def _centred(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minus the mean of each line, 0 where unknown; and how many are known, [lines, 1]."""
    known = ~np.isnan(rewards)
    count = known.sum(-1, keepdims=True)
    filled = np.where(known, rewards, 0.0)
    return np.where(known, filled - filled.sum(-1, keepdims=True) / np.maximum(count, 1), 0.0), count


def _centred_and_std(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centred, count = _centred(rewards)
    return centred, np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1))
