"""One round of reward calls, submitted at once."""

from collections.abc import Sequence

from grpo.rewards import RewardInput
from grpo.rewards.calls import Answer, Call
from grpo.rewards.pool import Rewards
from grpo.types import Pulse


def answers_of(
    rewards: Rewards, inputs: Sequence[RewardInput], calls: Sequence[Call], pulse: Pulse = lambda: False
) -> list[Answer | None]:
    """The answers to one round of calls."""
    rewards.begin()
    rewards.submit(inputs, calls)
    return rewards.collect(pulse)
