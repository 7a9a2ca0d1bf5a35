"""Rewards: the user's functions, called in processes of their own, so that none can take the run down.

A function is called with one completion (lists of length 1), or, when marked `sees_group`, with one whole
group in sample order; never with whatever a rank happens to hold. So a score cannot depend on the number
of processes.

In: completions as text, with their data columns. Out: one number, None or a failure for each function and completion.
What functions there are to choose from: grpo/reward_library/. Another way to isolate them is another file here.

    trainer (pool)  --calls-->  supervisor  --calls-->  worker: imports the user's file, calls the function
                    <-answers--             <-answers--

    pool               finds the functions, deals calls out to the supervisors, reads their answers
    pending_calls      the calls of one step: which wait, what was answered
    supervisor_handle  a supervisor process as the trainer holds it
    supervisor         holds the deadline and the limits; kills and replaces its worker; runs no user code
    worker             the only process that runs the user's file; marked `runs_code`, one process for each sample
    functions          importing a file, one call, what counts as a score
    protocol           frames of JSON between them
    sandbox            what the kernel offers: namespaces, limits, finding and killing all descendants

A call that raises, hangs, dies, or returns something that is no usable number is a failure: its score is None,
the function's name, the reason and the sample are reported, and too many failures stop the run.

Workers import this package: it stays free of numpy and torch.
"""

from dataclasses import dataclass
from typing import Any


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as a string or as a list of messages (its last one counts).

    >>> completion_text([{"role": "assistant", "content": "4"}])
    '4'
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class RewardInput:
    """One completion as rewards see it."""

    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    token_ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Reward:
    """A named reward function: its weight, and how it wants to be called."""

    name: str
    weight: float
    sees_group: bool = False  # called with a whole group at once
    runs_code: bool = False  # executes what a model wrote: one process for each call
    source: str = ""  # the function's text, for the run's fingerprint

    @property
    def short(self) -> str:
        """The function's own name, for metrics.

        >>> Reward("my.py:f_reward", 1.0).short
        'f_reward'
        """
        return self.name.rpartition(":")[2]


@dataclass(frozen=True)
class Failure:
    """A call that gave no usable score."""

    name: str
    reason: str
    sample: RewardInput
    timeout: bool = False  # no answer before the deadline

    def __str__(self) -> str:
        text = " ".join(completion_text(self.sample.completion).split())
        return f"reward {self.name} failed: {self.reason}; completion: {text[:200]!r}"
