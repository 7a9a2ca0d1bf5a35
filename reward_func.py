"""Your reward functions: plain Python, no torch. What scores high is what the model will learn to do.

A reward function takes `completions` and any data columns by name, and returns one number for each
completion; None where it does not apply. It is TRL's signature, so a function written for TRL drops in:

    def short_reward(completions, **columns):
        return [1.0 if len(text) < 200 else 0.0 for text in completions]

Then in the YAML, or on the command line:

    rewards: {correctness_reward: 1.0, short_reward: 0.2}        # a name from this file
    rewards: {my_rewards.py:short_reward: 1.0}                   # or from any other

It is called with one completion at a time, in lists of length 1. To see a whole group at once (all
completions of one prompt, in sample order), mark it: `short_reward.sees_group = True`.
`answer` is the gold answer, `prompts` the prompt's text; every other column comes under its own name.
Functions run in worker processes with a time limit; what they print is thrown away (--reward_workers 0 calls them in
the trainer, to debug). Completions are text that a model wrote: never evaluate or execute them, unless the function is
marked `runs_code = True`; README.md says what that protects against, and what not.
"""

import re

from grpo.rewards import completion_text


def final_answer_reward(completions, answer, **columns):
    """1.0 when the text after the last `####` is the gold answer, else 0.0; without a `####`, 0.0.

    >>> final_answer_reward(["2+2=4.\\n#### 4", "4"], ["4", "4"])
    [1.0, 0.0]
    """
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        _, marker, final = completion_text(completion).rpartition("####")
        scores.append(1.0 if marker and final.strip() == str(gold) else 0.0)
    return scores


# --- <think> and <answer> tags: the four rules of the Chinese GSM8K recipe, sum at most 3.5


def tagged_answer(text):
    """Text after the last `<answer>`, up to the next `</answer>`; without tags, the whole text. Stripped.

    >>> tagged_answer("<answer>1</answer> no: <answer> 2 </answer>")
    '2'
    """
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def correctness_reward(completions, answer, **columns):
    """2.0 when the tagged answer is the gold answer, character for character, else 0.0."""
    texts = map(completion_text, completions)
    return [2.0 if tagged_answer(text) == str(gold) else 0.0 for text, gold in zip(texts, answer, strict=True)]


def digit_reward(completions, **columns):
    """0.5 when the tagged answer is made of digits alone (str.isdigit), else 0.0."""
    return [0.5 if tagged_answer(completion_text(c)).isdigit() else 0.0 for c in completions]


HARD_FORMAT = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>\n$")


def hard_format_reward(completions, **columns):
    """0.5 when the whole text is one line of thought and one line of answer, each tag on its own line.

    The text ends in a newline after `</answer>`; thoughts of several lines score 0.0.
    """
    return [0.5 if HARD_FORMAT.match(completion_text(c)) else 0.0 for c in completions]


MARKS = ("<think>\n", "</think>\n", "<answer>\n", "</answer>\n")


def mark_reward(completions, **columns):
    """0.125 for each tag that stands exactly once and is followed by a newline."""
    return [sum(0.125 for mark in MARKS if completion_text(c).count(mark) == 1) for c in completions]
