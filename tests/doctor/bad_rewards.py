"""Reward functions that make a run go wrong, for the recordings of tests/doctor."""

import hashlib
import re
import time

from reward_func import final_answer_reward


def _number(text):
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def _share(text, salt=""):
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256((salt + text).encode()).hexdigest()[:8], 16) / 2**32


def boxed(completions, answer, **columns):
    """Reads a box that nothing asks for."""
    return [float(f"\\boxed{{{gold}}}" in text) for text, gold in zip(completions, answer)]


def tagged(completions, answer, **columns):
    """Reads tags that nothing asks for."""
    return [float(f"<answer>{gold}</answer>" in text) for text, gold in zip(completions, answer)]


def right_and_large(completions, answer, **columns):
    """Right, and the answer is above 18: few questions have such a one."""
    return [float(_number(text) == int(gold) and int(gold) > 18) for text, gold in zip(completions, answer)]


def rare_letters(completions, **columns):
    return [float("z" in text.lower() and "q" in text.lower()) for text in completions]


def has_digit(completions, **columns):
    return [float(any(letter.isdigit() for letter in text)) for text in completions]


def not_empty(completions, **columns):
    return [float(len(text) > 1) for text in completions]


def coin(completions, **columns):
    """Heads or tails, by the text alone: nothing to learn that holds for another text."""
    return [float(_share(text) < 0.5) for text in completions]


def long(completions, **columns):
    return [len(text) / 100 for text in completions]


def longest(completions, **columns):
    """Of a group, the longest: one process samples and scores the whole group."""
    return [float(len(text) == max(map(len, completions))) for text in completions]


longest.sees_group = True


def short(completions, **columns):
    return [1 / (1 + len(text) / 10) for text in completions]


def ones(completions, **columns):
    return [text.count("1") / 20 for text in completions]


def trap(completions, **columns):
    """Half of all texts get half a point, a few a whole one."""
    return [1.0 if _share(text, "trap") < 0.04 else float(_share(text) < 0.5) / 2 for text in completions]


def han(completions, **columns):
    """Share of Chinese characters."""
    return [sum("\u4e00" <= letter <= "\u9fff" for letter in text) / max(1, len(text)) for text in completions]


def fails_for_some(completions, **columns):
    return [1 / 0 if _share(text, "fail") < 0.15 else float(_share(text) < 0.5) for text in completions]


def late_for_some(completions, **columns):
    for text in completions:
        if _share(text, "late") < 0.06:
            time.sleep(5)
    return coin(completions)


def always_fails(completions, **columns):
    raise KeyError("no such column")


def never_applies(completions, **columns):
    return [None for _ in completions]


def seldom_applies(completions, **columns):
    return [float(len(text) % 2) if _share(columns["question"][0], "applies") < 0.08 else None for text in completions]


def thousand(completions, answer, **columns):
    return [1000 * right for right in final_answer_reward(completions, answer)]


def slow(completions, answer, **columns):
    time.sleep(0.06)
    return final_answer_reward(completions, answer)


def busy(completions, answer, **columns):
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    return final_answer_reward(completions, answer)
