"""The calls of one step or evaluation, from being asked for to being answered; they may be asked for bit by bit."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Answer, Call, Packed, failed

MAX_BATCH = 64  # calls handed out together


class PendingCalls:
    """Which calls wait, and what was answered. Calls are known by their place among all that were added."""

    def __init__(self, rewards: Sequence[Reward], num_workers: int):
        self.rewards = rewards
        self.num_workers = num_workers
        self.packed = Packed()
        self.calls: list[Call] = []
        self.answers: list[Answer | None] = []
        self.waiting: dict[bool, deque[int]] = {False: deque(), True: deque()}  # plain ones; those that run code
        self.batch_size = {False: 1, True: 1}

    def add(self, samples: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """More samples, and calls on rows of all samples that were added so far."""
        self.packed.add(samples)
        first = len(self.calls)
        self.calls += calls
        self.answers += [None] * len(calls)
        for i in sorted(range(first, len(self.calls)), key=lambda i: self.calls[i].rows):
            if reason := self.packed.problem(self.calls[i].rows):
                self.fail(i, reason)
            else:
                self.waiting[self._runs_code(i)].append(i)
        for runs_code, waiting in self.waiting.items():  # two batches or more for every worker
            size = math.ceil(len(waiting) / (2 * self.num_workers))
            self.batch_size[runs_code] = min(MAX_BATCH, max(1, size))

    @property
    def waits(self) -> bool:
        """Whether calls are there that no worker has."""
        return any(self.waiting.values())

    @property
    def untouched(self) -> bool:
        """Whether every call still waits."""
        return sum(map(len, self.waiting.values())) == len(self.calls) > 0

    def next_batch(self) -> list[int]:
        """Calls to hand out together: rows that came first, functions that run code apart. At least one must wait."""
        kinds = [kind for kind, waiting in self.waiting.items() if waiting]
        oldest = min(kinds, key=lambda kind: max(self.calls[self.waiting[kind][0]].rows))
        waiting = self.waiting[oldest]
        return [waiting.popleft() for _ in range(min(self.batch_size[oldest], len(waiting)))]

    def put_back(self, batch: Sequence[int]) -> None:
        """Calls of a batch that nobody has begun."""
        for i in reversed(batch):
            self.waiting[self._runs_code(i)].appendleft(i)

    def fail(self, i: int, reason: str) -> None:
        """No score for any row of a call."""
        self.answers[i] = failed(self.calls[i], reason)

    def request(self, batch: Sequence[int]) -> tuple[dict[str, Any], bytes]:
        """Header and body that let a worker make these calls."""
        header, body = self.packed.request([self.calls[i] for i in batch])
        return {**header, "runs_code": self._runs_code(batch[0])}, body

    def _runs_code(self, i: int) -> bool:
        return self.rewards[self.calls[i].k].runs_code
