"""The demo's control: the true rewards of a group, handed out in an order that knows nothing of correctness.

Same distribution of rewards, same groups, same step: only the link between an answer and its reward is cut.
Whatever accuracy a run gains with this reward, it did not gain by learning from rewards.

    train.py --rewards '{"benchmarks/shuffled_reward.py:shuffled_final_answer_reward": 1.0}'
"""

import hashlib

from reward_func import final_answer_reward, last_number_reward


def shuffled(prompts, scores):
    """Scores in an order that a hash of the prompt and the position decides."""
    key = lambda position: hashlib.sha256(f"{prompts[0]}\n{position}".encode()).digest()  # noqa: E731
    return [scores[position] for position in sorted(range(len(scores)), key=key)]


def shuffled_final_answer_reward(prompts, completions, answer, **columns):
    """Permute the group's final_answer_reward by a hash of the prompt and the position.

    Every permutation is equally likely, those that leave a reward in its place included: then the expected
    advantage of an answer is exactly zero, right or wrong. (Excluding them would punish being right.)

    Evaluation calls this first reward function with groups of one, whose only permutation is the identity:
    the accuracy it reports stays the true one.

    >>> shuffled_final_answer_reward(["2+2?"], ["#### 4"], ["4"])
    [1.0]
    >>> sorted(shuffled_final_answer_reward(["2+2?"] * 3, ["#### 4", "#### 5", "6"], ["4"] * 3))
    [0.0, 0.0, 1.0]
    """
    return shuffled(prompts, final_answer_reward(completions, answer))


shuffled_final_answer_reward.sees_group = True


def random_reward(prompts, completions, answer, **columns):
    """1 for a third of a group's completions, by a hash of the prompt and the position alone.

    For baselines beyond the group: there a group's mean says how well it was answered, and shuffling leaves the mean
    as it is. An answer alone, as in an evaluation, gets its true final_answer_reward.

    >>> random_reward(["2+2?"], ["#### 4"], ["4"]), len(random_reward(["2+2?"] * 9, ["#### 4"] * 9, ["4"] * 9))
    ([1.0], 9)
    """
    if len(completions) == 1:
        return final_answer_reward(completions, answer)
    key = lambda position: hashlib.sha256(f"random\n{prompts[0]}\n{position}".encode()).digest()[0]  # noqa: E731
    return [float(key(position) % 3 == 0) for position in range(len(completions))]


random_reward.sees_group = True


def shuffled_last_number_reward(prompts, completions, answer, **columns):
    """The same of last_number_reward.

    >>> sorted(shuffled_last_number_reward(["2+2?"] * 3, ["4", "It is 5", "6"], ["4"] * 3))
    [0.0, 0.0, 1.0]
    """
    return shuffled(prompts, last_number_reward(completions, answer))


shuffled_last_number_reward.sees_group = True
