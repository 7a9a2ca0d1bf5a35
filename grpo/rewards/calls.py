"""Calls and answers, and how they travel between the trainer and a supervisor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.rewards import RewardInput
from grpo.rewards.functions import LARGEST, MAX_REASON, Outcome
from grpo.rewards.logged import is_logged
from grpo.rewards.protocol import dump, frame, load
from grpo.rewards.supervisor import ANSWER, LATE


@dataclass(frozen=True)
class Call:
    """One call of the k-th function, on one row or on a group of rows."""

    k: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The outcome of a call for each of its rows; a str is the reason why a row has no score."""

    outcomes: list[Outcome]
    timeout: bool = False
    columns: Mapping[str, list[Any]] = field(default_factory=dict)  # logged by the call: one value for each row
    metrics: Mapping[str, list[float]] = field(default_factory=dict)


class Packed:
    """Reward inputs as bytes; inputs of one prompt share the bytes of its columns.

    A str in place of bytes says why a part cannot be sent.
    """

    def __init__(self) -> None:
        self.rows: list[bytes | str] = []
        self.prompts: list[bytes | str] = []
        self.prompt_of: list[int] = []  # row -> index in prompts
        self.prompt_index: dict[tuple[int, int], int] = {}  # ids of columns and prompt -> index in prompts
        self.keep_alive: list[RewardInput] = []  # one input of each prompt, so that the ids above are not reused

    def add(self, inputs: Sequence[RewardInput]) -> None:
        """Append inputs; their rows continue the numbering."""
        for one in inputs:
            self.rows.append(_dump([one.completion, one.token_ids]))
            key = (id(one.columns), id(one.prompt))
            if key not in self.prompt_index:
                self.prompt_index[key] = len(self.prompts)
                self.prompts.append(_dump([one.prompt, one.columns]))
                self.keep_alive.append(one)
            self.prompt_of.append(self.prompt_index[key])

    def problem(self, rows: Sequence[int]) -> str | None:
        """Why these rows cannot be sent; None: they can."""
        parts = [part for row in rows for part in (self.prompts[self.prompt_of[row]], self.rows[row])]
        return next((part for part in parts if isinstance(part, str)), None)

    def request(self, calls: Sequence[Call]) -> tuple[dict[str, Any], bytes]:
        """Header and body of a request for these calls, with only the rows and prompts that they need."""
        rows = sorted({row for one in calls for row in one.rows})
        prompts = sorted({self.prompt_of[row] for row in rows})
        # place of each row and prompt in the body
        row_at = {row: at for at, row in enumerate(rows)}
        prompt_at = {prompt: at for at, prompt in enumerate(prompts)}
        header = {
            "calls": [[one.k, [row_at[row] for row in one.rows]] for one in calls],
            "num_prompts": len(prompts),
            "prompt_of": [prompt_at[self.prompt_of[row]] for row in rows],
        }
        parts = [self.prompts[prompt] for prompt in prompts] + [self.rows[row] for row in rows]
        return header, b"".join(frame(part) for part in parts if isinstance(part, bytes))


def read_answer(data: bytes, current: Call, if_ended: float | None = None) -> Answer:
    """An answer from its bytes, which are not trusted: a worker may have written anything. if_ended: see Reward.

    >>> read_answer(b"A[1.0,null]", Call(0, (4, 5))).outcomes
    [1.0, None]
    >>> read_answer(b"A[1e400]", Call(0, (4,))).outcomes
    ['its worker gave something that is no answer']
    """
    kind, payload = data[:1], data[1:]
    if kind != ANSWER and if_ended is not None:
        return Answer([if_ended] * len(current.rows))
    if kind != ANSWER:
        return Answer([payload.decode("utf-8", "replace")[:MAX_REASON]] * len(current.rows), kind == LATE)
    try:
        outcomes = load(payload)
    except (ValueError, RecursionError):
        outcomes = None
    if isinstance(outcomes, str) and if_ended is not None:
        return Answer([if_ended] * len(current.rows))
    if isinstance(outcomes, str):
        return failed(current, outcomes[:MAX_REASON])
    columns: Any = {}
    metrics: Any = {}
    if isinstance(outcomes, dict):
        if isinstance(limit_s := outcomes.get("late"), float):
            return Answer([f"no answer within {limit_s:g} s"] * len(current.rows), timeout=True)
        columns, metrics = outcomes.get("columns"), outcomes.get("metrics")
        outcomes = outcomes.get("scores") if is_logged(columns, metrics, len(current.rows)) else None
    if isinstance(outcomes, list) and len(outcomes) == len(current.rows) and all(map(_is_outcome, outcomes)):
        shown = [one[:MAX_REASON] if isinstance(one, str) else one for one in outcomes]
        return Answer(shown, columns=columns, metrics=metrics)
    return failed(current, "its worker gave something that is no answer")


def _dump(value: Any) -> bytes | str:
    try:
        return dump(value)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)[:MAX_REASON]


def _is_outcome(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, float) and abs(value) <= LARGEST)


def failed(current: Call, reason: str) -> Answer:
    """The answer of a call without a score for any of its rows."""
    return Answer([reason] * len(current.rows))
