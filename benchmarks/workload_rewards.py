"""Reward functions that both sides of benchmarks/vs_trl.py call."""

import re
import zlib


def _spread(text):
    return (zlib.crc32(text.encode()) % 1000) / 1000


def number_reward(completions, answer, **columns):
    """1 where the last number after #### is the gold one."""
    found = [re.findall(r"####\s*(-?\d+)", text) for text in completions]
    return [float(bool(n) and n[-1] == gold.split("####")[-1].strip()) for n, gold in zip(found, answer, strict=True)]


def spread_reward(completions, **columns):
    """A different number for every text: each group has variance."""
    return [_spread(text) for text in completions]


def easy_reward(prompts, completions, **columns):
    """As spread_reward, but the same for all in 70 % of the groups."""
    return [0.5 if _spread(prompt) < 0.7 else _spread(text) for prompt, text in zip(prompts, completions, strict=True)]
