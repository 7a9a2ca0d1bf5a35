from grpo.reward_library import *  # noqa: F403
from grpo.rewards import completion_text


def short_reward(completions, limit=40, **columns):
    """More for a shorter text, 0 from `limit` characters on."""
    return [max(0.0, 1 - len(completion_text(text)) / limit) for text in completions]


def spread_reward(completions, **columns):
    """A group's share of completions that differ from each other."""
    return [len(set(map(completion_text, completions))) / len(completions)] * len(completions)


spread_reward.sees_group = True
