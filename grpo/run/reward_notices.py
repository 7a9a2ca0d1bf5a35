"""Names that TRL, open-r1 or verl use for other rules: what to say when the first completions are written for those."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from grpo import reward_library
from grpo.rewards import Reward

BOX = "\\boxed{"
THINK_TAGS = ("<think>", "</think>")
TAGS = (*THINK_TAGS, "<answer>", "</answer>")


def notices(rewards: Sequence[Reward], texts: Sequence[str]) -> list[str]:
    """A line for each of the library's functions that reads something else than what these completions offer.

    >>> accuracy = Reward("accuracy_reward", 1.0, source=inspect.getsource(reward_library.accuracy_reward))
    >>> len(notices([accuracy], [r"so \\boxed{4}"])), len(notices([accuracy], [r"<answer>\\boxed{4}"]))
    (1, 0)
    """
    found = []
    for reward in rewards:
        notice = NOTICES.get(reward.name.partition("@")[0])
        if notice is not None and reward.source.startswith(_source(reward.name.partition("@")[0])):
            line = notice(reward, texts)
            found += [f"note: {line}"] if line else []
    return found


def _source(name: str) -> str:
    return inspect.getsource(getattr(reward_library, name))


def _reads_no_box(reward: Reward, texts: Sequence[str], elsewhere: str) -> str | None:
    start = reward.marks[0] if reward.marks else "<answer>"
    if not any(BOX in text for text in texts) or any(start in text for text in texts):
        return None
    return (
        f"{reward.name} reads the answer behind {start}, and none of these completions has it; some have \\boxed{{}}. "
        f"{elsewhere}boxed_math_reward reads boxes."
    )


def _format(reward: Reward, texts: Sequence[str]) -> str | None:
    if any(reward_library.format_reward(texts)):
        return None
    if any(all(tag in text for tag in TAGS) for text in texts):
        return (
            "format_reward wants each of its four tags on a line of its own, and no completion has them so; "
            "multiline_format_reward does not."
        )
    if any(all(tag in text for tag in THINK_TAGS) for text in texts):
        return (
            "format_reward wants <answer> too, and no completion has it; TRL's rule for <think> is think_format_reward."
        )
    return None


NOTICES: dict[str, Callable[[Reward, Sequence[str]], str | None]] = {
    "accuracy_reward": partial(_reads_no_box, elsewhere="TRL and open-r1 use this name for what reads them; here "),
    "math_reward": partial(_reads_no_box, elsewhere="verl uses this name for what reads them; here "),
    "numeric_reward": partial(_reads_no_box, elsewhere="Here "),
    "format_reward": _format,
}
