"""Advantages: how much better a completion is than its group.

    A_g = (r_g - mean(r)) / (std(r) + 1e-8)        DeepSeekMath, arXiv 2402.03300, section 4.1.2

Differs from the paper: the standard deviation is the unbiased one, as in TRL; a group whose rewards are all equal gets
exactly 0 (rounding in the mean would otherwise give all its rows one sign), and so does a group whose standard
deviation is below 1e-6; divided advantages are clipped; `scale=False` (Dr. GRPO, arXiv 2503.20783) leaves both out.
The variance is computed in two passes, in float64. Other baselines and scales: other_advantages.py.
"""

import numpy as np

STD_FLOOR = 1e-6
STD_EPS = 1e-8


def group_advantages(rewards: np.ndarray, scale: bool = True, clip: float = 10.0) -> np.ndarray:
    """[P, G] rewards, NaN where a row has none -> [P, G] float64 advantages, 0 where a row has none.

    >>> group_advantages(np.array([[1.0, 0.0, 0.0, 0.0]])).round(6).tolist()
    [[1.5, -0.5, -0.5, -0.5]]
    >>> group_advantages(np.array([[0.1, 0.1, 0.1]])).tolist()
    [[0.0, 0.0, 0.0]]
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    known = ~np.isnan(rewards)
    count = known.sum(-1, keepdims=True)
    filled = np.where(known, rewards, 0.0)
    centred = np.where(known, filled - filled.sum(-1, keepdims=True) / np.maximum(count, 1), 0.0)
    std = np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1))
    if scale:
        centred = np.where(std < STD_FLOOR, 0.0, centred / (std + STD_EPS)).clip(-clip, clip)
    return np.where(equal_groups(rewards)[:, None], 0.0, centred)


def equal_groups(rewards: np.ndarray) -> np.ndarray:
    """[P, G] rewards -> [P] bool: groups without gradient, because all their known rewards are equal."""
    known = ~np.isnan(rewards)
    high = np.where(known, rewards, -np.inf).max(-1)
    low = np.where(known, rewards, np.inf).min(-1)
    return (known.sum(-1) < 2) | (high == low)
