"""Rewards: the user's functions, called in separate processes, so that a failing function cannot end the run.

A function is called with one completion (lists of length 1), or, when marked `sees_group`, with one whole group in
row order. A call never depends on which rows a rank holds, so a score does not depend on the number of processes.

In: completions as text, with their data columns. Out: a number, None or a failure for each function and completion.
The functions that come with the project are in grpo/reward_library/. Another way to isolate functions is another file
here.

    trainer (pool)  --calls-->  supervisor  --calls-->  worker: imports the user's file, calls the function
                    <-answers--             <-answers--

    pool               finds the functions, hands calls out to the supervisors, reads their answers
    pending_calls      the calls of one step: which wait, and the answers so far
    supervisor_handle  the trainer's side of one supervisor: its process, its socket, the calls it is working on
    supervisor         enforces the deadline and the limits; kills and replaces its worker; runs no user code
    worker             the only process that runs the user's file; functions marked `runs_code` get one process a call
    functions          importing a file, one call, what counts as a score
    coroutines         awaiting several calls at once
    logged             the trainer's state for functions, and what they log
    neighbours         the modules beside a reward file, which it imports
    loading            finding the files of the functions; their descriptions as `Reward`
    calls              calls and answers as bytes
    protocol           frames of JSON between the processes
    sandbox            what the kernel offers: namespaces, limits, finding and killing all descendants

A call that raises, hangs, dies, or returns something other than usable numbers is a failure: its score is None, the
function's name, the reason and the completion are reported, and too many failures stop the run.

Workers import this package, so it imports neither numpy nor torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

# A function that rewards a refusal to answer has these two parameters: the score of a refusal, and its text.
REFUSAL_SCORE, REFUSAL_TEXT = "refuse", "marker"
# One that reads the answer between two texts has these.
ANSWER_MARKS = ("start", "end")


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion: the string itself, or the content of the last message.

    >>> completion_text([{"role": "assistant", "content": "4"}])
    '4'
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _function_and_label(name: str) -> str:
    return name.rpartition(":")[2].replace("@", ".")


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each reward's name in metrics and tables: the function's own, after as much of its path as tells it apart.

    >>> list(short_names(["mark_reward", "my.py:f_reward"]).values())
    ['mark_reward', 'f_reward']
    >>> list(short_names(["a/my.py:f_reward", "b/my.py:f_reward", "f_reward"]).values())
    ['a.my.f_reward', 'b.my.f_reward', 'reward_func.f_reward']
    >>> list(short_names(["model_reward@helpful", "model_reward@harmless"]).values())
    ['model_reward.helpful', 'model_reward.harmless']
    """
    paths = {}
    for name in names:
        file = name.rpartition(":")[0]
        paths[name] = [*PurePath(file or "reward_func.py").with_suffix("").parts, _function_and_label(name)]
    shown = {}
    for name, parts in paths.items():
        same = [other for other in paths.values() if other[-1] == parts[-1]]
        depths = (n for n in range(1, len(parts) + 1) if sum(other[-n:] == parts[-n:] for other in same) == 1)
        shown[name] = ".".join(parts[-next(depths, len(parts)) :]).strip("/.")
    # one file named in two ways, such as a.py and ./a.py, or a.b.py and a/b.py: numbered
    count: Counter[str] = Counter()
    for name, short in shown.items():
        count[short] += 1
        shown[name] = short if count[short] == 1 else f"{short}_{count[short]}"
    return shown


@dataclass(frozen=True)
class RewardInput:
    """One completion as rewards see it."""

    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    token_ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Reward:
    """A named reward function: its weight, and how it is called."""

    name: str
    weight: float
    sees_group: bool = False  # called with a whole group at once
    runs_code: bool = False  # executes what a model wrote: one process for each call
    source: str = ""  # the function's text, for the run's fingerprint
    worth_of_refusal: float = 0.0  # its score for a refusal, 0 where it does not reward one
    reads_gold: bool = False  # None from it means that it cannot read the gold answer, whatever the completion is
    marks: tuple[str, str] | None = None  # the answer stands after the last of the first, up to the second
    right: float = 1.0  # its score for a right answer, where it has 0 for any other
    if_ended: float | None = None  # the score of a call that the code in it ends, late calls included; None: a failure
    takes: Sequence[str] = ()  # which of TRL's further arguments it gets (logged.py)
    is_async: bool = False  # a coroutine: calls of one file are awaited at the same time
    needs: Sequence[str] = ()  # arguments that only a data column can give

    @property
    def short(self) -> str:
        """The function's own name, for metrics.

        >>> Reward("my.py:f_reward@a", 1.0).short
        'f_reward.a'
        """
        return _function_and_label(self.name)

    @property
    def lane(self) -> tuple[bool, bool, str]:
        """Calls of one lane may be handed out together: of functions that run code, of plain ones, of coroutines."""
        together = self.is_async and not self.runs_code
        return self.runs_code, together, self.name.rpartition(":")[0] if together else ""


def see_groups(rewards: Sequence[Reward]) -> bool:
    """Whether one of them is called with whole groups, so that one rank has to sample all completions of a prompt."""
    return any(reward.sees_group for reward in rewards)


@dataclass(frozen=True)
class Failure:
    """A call that gave no usable score for a completion."""

    name: str
    reason: str
    input: RewardInput
    timeout: bool = False  # no answer before the deadline

    def __str__(self) -> str:
        text = " ".join(completion_text(self.input.completion).split())
        return f"reward {self.name} failed: {self.reason}; completion: {text[:200]!r}"
