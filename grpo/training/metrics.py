"""Metrics of one step: sums with counts, and maxima; never a mean of means.

Every rank tallies the same names whatever it did, so one fixed-shape gather reduces them all.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from grpo.runtime.distributed import World

PHASES = ("rollout", "reward", "exchange", "logprobs", "update")
MEANS = ("clip/low", "clip/high", "clip/importance", "kl", "kl_old", "sampler_gap/mean", "sft/token_accuracy")
SUMS = ("loss",)
COUNTS = ("guards/oom_rollout", "guards/oom_update")
REPORTED = {phase: phase for phase in PHASES} | {"micro_batches": "update", "reduce": "reduce"}  # in heartbeats
MAXIMA = (
    "ratio_gap",
    "sampler_gap/max",
    "time/step_s",
    "time/micro_batches_s",
    "time/reduce_s",
    *(f"time/{phase}_s" for phase in PHASES),
)


class Tally:
    """What one rank adds up during a step."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self.on_phase = on_phase
        self.sums = dict.fromkeys((*MEANS, *SUMS, *COUNTS), 0.0)
        self.counts = dict.fromkeys(MEANS, 0.0)
        self.maxima = dict.fromkeys(MAXIMA, 0.0)
        self.pending: list[tuple[tuple[str, ...], tuple[str, ...], Tensor]] = []  # measured, still on the device
        self.began = time.monotonic()
        self.updates = 0

    def mean(self, name: str, total: float, count: float) -> None:
        """Add a sum over `count` items. A non-finite sum never enters an average."""
        if math.isfinite(total):
            self.sums[name] += total
            self.counts[name] += count

    def add(self, name: str, value: float) -> None:
        """Add to a sum."""
        if math.isfinite(value):
            self.sums[name] += value

    def top(self, name: str, value: float) -> None:
        """Raise a maximum."""
        if math.isfinite(value):
            self.maxima[name] = max(self.maxima[name], value)

    def micro_batch(self, loss: Tensor, means: dict[str, Tensor], maxima: dict[str, Tensor], mask: Tensor) -> None:
        """Note what a micro-batch measured: means [B, T] over the mask, maxima []. Nothing is read before `settle`."""
        totals = [torch.where(mask, values.detach().float(), 0.0).sum() for values in means.values()]
        numbers = torch.stack([loss, mask.sum().float(), *totals, *maxima.values()]).detach()
        self.pending.append((tuple(means), tuple(maxima), numbers))

    def settle(self) -> None:
        """Add what micro-batches measured since the last time, in their order. One transfer, however many they are."""
        pending, self.pending = self.pending, []
        read = iter(torch.cat([numbers for _, _, numbers in pending]).tolist() if pending else ())
        for means, maxima, _ in pending:
            self.add("loss", next(read))
            count = next(read)
            for name in means:
                self.mean(name, next(read), count)
            for name in maxima:
                self.top(name, next(read))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step; the slowest rank's seconds are logged."""
        if self.on_phase is not None and name in REPORTED:
            self.on_phase(REPORTED[name])
        start = time.monotonic()
        try:
            yield
        finally:
            self.maxima[f"time/{name}_s"] += time.monotonic() - start

    def mark(self) -> tuple[dict[str, float], ...]:
        """Where the sums stand, for `rewind`."""
        self.settle()
        return self.sums.copy(), self.counts.copy(), self.maxima.copy()

    def rewind(self, mark: tuple[dict[str, float], ...]) -> None:
        """Forget what was added since `mark`, times excepted: it will be added again."""
        times = {name: value for name, value in self.maxima.items() if name.startswith("time/")}
        self.sums, self.counts, self.maxima = mark[0].copy(), mark[1].copy(), mark[2] | times
        self.pending = []

    def reduce(self, world: World) -> dict[str, float]:
        """Reduce over ranks: means by their counts, sums, maxima. One gather. Means of nothing are left out."""
        if self.on_phase is not None:
            self.on_phase("log")
        self.settle()
        self.maxima["time/step_s"] = time.monotonic() - self.began
        row = np.array([*self.sums.values(), *self.counts.values(), *self.maxima.values()], dtype=np.float64)
        rows = world.gather_rows(row)
        sums, counts, maxima = np.split(rows, [len(self.sums), len(self.sums) + len(self.counts)], axis=1)
        total = dict(zip(self.sums, sums.sum(0).tolist(), strict=True))
        count = dict(zip(self.counts, counts.sum(0).tolist(), strict=True))
        means = {name: total[name] / count[name] for name in MEANS if count[name]}
        slowest = dict(zip(self.maxima, maxima.max(0).tolist(), strict=True))
        average = dict(zip(self.maxima, maxima.mean(0).tolist(), strict=True))
        for work in ("rollout", "micro_batches"):  # done apart; what follows waits for the slowest rank
            name = f"time/{work}_s"
            means[f"idle/{work}"] = 1 - average[name] / slowest[name] if slowest[name] > 0 else 0.0
        updates = max(1.0, self.updates)  # the same on every rank
        counted = {name: total[name] for name in COUNTS}
        return means | {name: total[name] / updates for name in SUMS} | counted | slowest
