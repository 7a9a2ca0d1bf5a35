"""The calls of one step or evaluation: which wait for a worker, and the answers so far. They may be added in parts."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Answer, Call, Packed, failed

MAX_BATCH = 64  # calls handed out together


class PendingCalls:
    """Waiting calls and answers. A call's number is its place among all that were added."""

    def __init__(self, rewards: Sequence[Reward], num_workers: int):
        self.rewards = rewards
        self.num_workers = num_workers
        self.packed = Packed()
        self.calls: list[Call] = []
        self.answers: list[Answer | None] = []
        self.waiting: dict[bool, deque[int]] = {False: deque(), True: deque()}  # by runs_code
        self.batch_size = {False: 1, True: 1}  # by runs_code

    def add(self, inputs: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """Add inputs, and calls on rows of all inputs added so far."""
        self.packed.add(inputs)
        first = len(self.calls)
        self.calls += calls
        self.answers += [None] * len(calls)
        for i in sorted(range(first, len(self.calls)), key=lambda i: self.calls[i].rows):
            if reason := self.packed.problem(self.calls[i].rows):
                self.fail(i, reason)
            else:
                self.waiting[self._runs_code(i)].append(i)
        for runs_code, waiting in self.waiting.items():  # at least two batches for every worker
            size = math.ceil(len(waiting) / (2 * self.num_workers))
            self.batch_size[runs_code] = min(MAX_BATCH, max(1, size))

    @property
    def waits(self) -> bool:
        """Whether any call has not been handed out."""
        return any(self.waiting.values())

    @property
    def untouched(self) -> bool:
        """Whether no call has been handed out, and there is at least one."""
        return sum(map(len, self.waiting.values())) == len(self.calls) > 0

    def next_batch(self) -> list[int]:
        """Calls to hand out together, earliest rows first; plain functions and `runs_code` apart. One must wait."""
        kinds = [runs_code for runs_code, waiting in self.waiting.items() if waiting]
        earliest = min(kinds, key=lambda runs_code: max(self.calls[self.waiting[runs_code][0]].rows))
        waiting = self.waiting[earliest]
        return [waiting.popleft() for _ in range(min(self.batch_size[earliest], len(waiting)))]

    def put_back(self, batch: Sequence[int]) -> None:
        """Return calls of a batch that were not begun to the front of their queue."""
        for i in reversed(batch):
            self.waiting[self._runs_code(i)].appendleft(i)

    def fail(self, i: int, reason: str) -> None:
        """Answer a call with a failure for all of its rows."""
        self.answers[i] = failed(self.calls[i], reason)

    def request(self, batch: Sequence[int]) -> tuple[dict[str, Any], bytes]:
        """Header and body of the request for a batch."""
        header, body = self.packed.request([self.calls[i] for i in batch])
        return {**header, "runs_code": self._runs_code(batch[0])}, body

    def _runs_code(self, i: int) -> bool:
        return self.rewards[self.calls[i].k].runs_code
