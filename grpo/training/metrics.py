"""Metrics of one step: sums with counts, and maxima; never a mean of means.

The module that measures a metric declares its name (`declare`), at import or before training begins. Every rank holds
all declared names, whether it measured them or not, so one gather of a fixed shape reduces them all.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo.runtime.distributed import World

NOT_MEASURED = -1.0
PHASES = ("rollout", "reward", "exchange", "logprobs", "update")
REPORTED = {phase: phase for phase in PHASES} | {"micro_batches": "update", "reduce": "reduce"}  # in heartbeats
MEANS: set[str] = set()  # over trained tokens, or over another count
SUMS: set[str] = set()  # over ranks, divided by the number of updates
COUNTS: set[str] = set()  # over ranks
MAXIMA: set[str] = set()  # over ranks


def declare(
    means: Iterable[str] = (), sums: Iterable[str] = (), counts: Iterable[str] = (), maxima: Iterable[str] = ()
) -> None:
    """Add names of metrics. All ranks must declare the same ones, before the first step."""
    for declared, names in ((MEANS, means), (SUMS, sums), (COUNTS, counts), (MAXIMA, maxima)):
        declared.update(names)


declare(
    sums=("loss",),
    counts=("guards/oom_rollout",),
    maxima=("time/step_s", "time/micro_batches_s", "time/reduce_s", *(f"time/{phase}_s" for phase in PHASES)),
)


@dataclass(frozen=True)
class Reduced:
    """A step's metrics over all ranks, the same on every rank."""

    metrics: dict[str, float]
    sampler_gap: float | None  # largest |policy - sampler| log-prob; None: not measured in this step


class Tally:
    """Sums, counts and maxima of one rank during a step."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self.on_phase = on_phase
        self.sums = dict.fromkeys(sorted(MEANS | SUMS | COUNTS), 0.0)
        self.counts = dict.fromkeys(sorted(MEANS), 0.0)
        self.maxima = dict.fromkeys(sorted(MAXIMA), 0.0)
        self.sampler_gap = NOT_MEASURED
        self.pending: list[tuple[tuple[str, ...], tuple[str, ...], Tensor]] = []  # measured, still on the device
        self.began = time.monotonic()
        self.updates = 0

    def mean(self, name: str, total: float, count: float) -> None:
        """Add a sum over `count` items. A non-finite sum never enters an average."""
        if math.isfinite(total):
            self.sums[name] += total
            self.counts[name] += count

    def add(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self.sums[name] += value

    def top(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self.maxima[name] = max(self.maxima[name], value)

    def micro_batch(
        self,
        loss: Tensor,
        means: dict[str, Tensor],
        maxima: dict[str, Tensor],
        trained: Tensor,
        sampler_gap: Tensor | None = None,
    ) -> None:
        """Record a micro-batch: means [B, T] over trained tokens, maxima []. `settle` reads them: one device sync."""
        totals = [torch.where(trained, values.detach().float(), 0.0).sum() for values in means.values()]
        gap = torch.full_like(loss, NOT_MEASURED) if sampler_gap is None else sampler_gap
        numbers = torch.stack([loss, trained.sum(), gap, *totals, *maxima.values()]).detach()
        self.pending.append((tuple(means), tuple(maxima), numbers))

    def settle(self) -> None:
        """Add the micro-batches recorded since the last call, in their order; one transfer for all of them."""
        pending, self.pending = self.pending, []
        read = iter(torch.cat([numbers for _, _, numbers in pending]).tolist() if pending else ())
        for means, maxima, _ in pending:
            self.add("loss", next(read))
            count, gap = next(read), next(read)
            if math.isfinite(gap):
                self.sampler_gap = max(self.sampler_gap, gap)
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

    def mark(self) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
        """A copy of all sums, for `rewind`."""
        self.settle()
        return self.sums.copy(), self.counts.copy(), self.maxima.copy(), self.sampler_gap

    def rewind(self, mark: tuple[dict[str, float], dict[str, float], dict[str, float], float]) -> None:
        """Restore the sums of `mark`, except times: the work since then will be done again."""
        times = {name: value for name, value in self.maxima.items() if name.startswith("time/")}
        sums, counts, maxima, self.sampler_gap = mark
        self.sums, self.counts, self.maxima = sums.copy(), counts.copy(), maxima | times
        self.pending = []

    def reduce(self, world: World) -> Reduced:
        """Reduce over ranks, in one gather. A mean whose count is 0 is left out."""
        if self.on_phase is not None:
            self.on_phase("log")
        self.settle()
        self.maxima["time/step_s"] = time.monotonic() - self.began
        row = [*self.sums.values(), *self.counts.values(), *self.maxima.values(), self.sampler_gap]
        rows = world.gather_rows(np.array(row, dtype=np.float64))
        sums, counts, maxima, gaps = np.split(rows, np.cumsum([len(self.sums), len(self.counts), len(self.maxima)]), 1)
        total = dict(zip(self.sums, sums.sum(0).tolist(), strict=True))
        count = dict(zip(self.counts, counts.sum(0).tolist(), strict=True))
        slowest = dict(zip(self.maxima, maxima.max(0).tolist(), strict=True))
        average = dict(zip(self.maxima, maxima.mean(0).tolist(), strict=True))
        updates = max(1.0, self.updates)  # the same on every rank
        metrics = {name: total[name] / count[name] for name in count if count[name]}
        for work in ("rollout", "micro_batches"):  # the collective after it waits for the slowest rank
            name = f"time/{work}_s"
            metrics[f"idle/{work}"] = 1 - average[name] / slowest[name] if slowest[name] > 0 else 0.0
        metrics |= {name: total[name] / (updates if name in SUMS else 1) for name in total if name not in count}
        gap = float(gaps.max())
        return Reduced(metrics | slowest, None if gap == NOT_MEASURED else gap)
