"""The calls of one step or evaluation: which wait for a worker, and the answers so far. They may be added in parts."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Answer, Call, Packed, failed

MAX_BATCH = 64  # calls handed out together
Lane = tuple[bool, bool, str]  # see Reward.lane


class PendingCalls:
    """Waiting calls and answers. A call's number is its place among all that were added."""

    def __init__(self, rewards: Sequence[Reward], num_workers: int):
        self.rewards = rewards
        self.num_workers = num_workers
        self.packed = Packed()
        self.calls: list[Call] = []
        self.answers: list[Answer | None] = []
        self.waiting: dict[Lane, deque[int]] = {reward.lane: deque() for reward in rewards}
        self.batch_size: dict[Lane, int] = {}

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
                self.waiting[self._lane(i)].append(i)
        for lane, waiting in self.waiting.items():  # at least two batches for every worker; coroutines wait at once
            size = math.ceil(len(waiting) / (1 if lane[1] else 2) / self.num_workers)
            self.batch_size[lane] = min(MAX_BATCH, max(1, size))

    @property
    def waits(self) -> bool:
        """Whether any call has not been handed out."""
        return any(self.waiting.values())

    @property
    def untouched(self) -> bool:
        """Whether no call has been handed out, and there is at least one."""
        return sum(map(len, self.waiting.values())) == len(self.calls) > 0

    def next_batch(self) -> list[int]:
        """Calls of one lane to hand out together, earliest rows first. One must wait."""
        lanes = [lane for lane, waiting in self.waiting.items() if waiting]
        earliest = min(lanes, key=lambda lane: max(self.calls[self.waiting[lane][0]].rows))
        waiting = self.waiting[earliest]
        return [waiting.popleft() for _ in range(min(self.batch_size[earliest], len(waiting)))]

    def put_back(self, batch: Sequence[int]) -> None:
        """Return calls of a batch that were not begun to the front of their queue."""
        for i in reversed(batch):
            self.waiting[self._lane(i)].appendleft(i)

    def fail(self, i: int, reason: str) -> None:
        """Answer a call with a failure for all of its rows."""
        self.answers[i] = failed(self.calls[i], reason)

    def request(self, batch: Sequence[int]) -> tuple[dict[str, Any], bytes]:
        """Header and body of the request for a batch."""
        header, body = self.packed.request([self.calls[i] for i in batch])
        runs_code, together, _ = self._lane(batch[0])
        return {**header, "runs_code": runs_code, "together": together}, body

    def _lane(self, i: int) -> Lane:
        return self.rewards[self.calls[i].k].lane
