"""Your reward functions: plain Python, no torch. The model learns to do what scores high.

A reward function takes `completions` and any data columns by name, and returns one number for each completion; None
where it does not apply. The signature is TRL's, so a function written for TRL works unchanged:

    def short_reward(completions, **columns):
        return [1.0 if len(text) < 200 else 0.0 for text in completions]

Then in the YAML, or on the command line:

    rewards: {correctness_reward: 1.0, short_reward: 0.2}        # a name from this file
    rewards: {my_rewards.py:short_reward: 1.0}                   # or from any other

A function is called with one completion at a time, in lists of length 1. To get a whole group at once (all completions
of one prompt, in row order), mark it: `short_reward.sees_group = True`.
`answer` is the gold answer, `prompts` the prompt's text; every other column has its own name.
An argument with a default can be set in the YAML: `reward_parameters: {short_reward: {limit: 200}}`.
Functions run in worker processes with a time limit, and their output is discarded (--reward_workers 0 calls them in the
trainer, for debugging). A model wrote the completions: never evaluate or execute them, unless the function is marked
`runs_code = True`; docs/rewards.md describes what that protects against, and what it does not.
"""

from grpo.reward_library import *  # noqa: F403  the functions that come with the project: docs/rewards.md lists them
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
