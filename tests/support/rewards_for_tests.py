"""Reward functions that tests put to work: pure, and not constant on what a random model writes."""


def varied(completions, **columns):
    """By length and characters: a few different values in most groups."""
    return [float((len(text) + sum(map(ord, text[:3]))) % 5) for text in completions]
