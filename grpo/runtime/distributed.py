"""Ranks and collectives: the only module that uses torch.distributed, apart from training/backends/.

Three collectives a step, in addition to those of the gradients: `sum_rows` (the O(N) table of the rollout), `exchange`
(each row's payload, once, to the rank that trains on it) and `gather_rows` (metrics). Their number depends neither on
the data nor on gradient accumulation; showing completions adds two, a KL in the rewards two, entropies up to two and
one an update. `any_rank` is for start-up, evaluations, stopping and checkpoints. Work is distributed through a counter
in the rendezvous store. Nothing is pickled.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from grpo.runtime.devices import pick_device, set_threads


class Waits:
    """The collective that this rank's main thread is in, "" for none. The watchdog reads it."""

    inside = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.inside = name
        try:
            yield
        finally:
            self.inside = ""


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, and their collectives. With size 1 there is no process group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: "dist.ProcessGroup | None" = None  # gloo, on CPU: small tables and flags, also beside NCCL
    background: "dist.ProcessGroup | None" = None  # gloo, for the thread that saves while training goes on
    deals: Iterator[int] = field(default_factory=itertools.count)  # numbers the calls of `deal`, equally on all ranks
    waits: Waits = field(default_factory=Waits)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, logs and writes."""
        return self.rank == 0

    def sum_rows(self, table: np.ndarray) -> np.ndarray:
        """Sum float64 tables of one shape over ranks: each rank fills its own rows and has zeros elsewhere."""
        if self.size == 1:
            return table
        tensor = torch.from_numpy(np.ascontiguousarray(table, dtype=np.float64))
        with self.waits("sum_rows"):
            dist.all_reduce(tensor, group=self.control)
        return tensor.numpy()

    def gather_rows(self, row: np.ndarray) -> np.ndarray:
        """[K] float64 on each rank -> [W, K] on every rank."""
        if self.size == 1:
            return row[None]
        own_row = torch.from_numpy(np.ascontiguousarray(row, dtype=np.float64))
        rows = [torch.empty_like(own_row) for _ in range(self.size)]
        with self.waits("gather_rows"):
            dist.all_gather(rows, own_row, group=self.control)
        return torch.stack(rows).numpy()

    def any_rank(self, *flags: bool, background: bool = False) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. One MAX reduction; background: in the saving thread's group."""
        if self.size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.background if background else self.control)
        return tuple(bool(flag) for flag in tensor.tolist())

    def exchange(self, outgoing: list[np.ndarray], incoming_sizes: list[int]) -> list[np.ndarray]:
        """Send outgoing[r] (int32) to rank r. Returns the arrays received, by rank. One all-to-all."""
        if self.size == 1:
            return outgoing
        send = torch.from_numpy(np.concatenate(outgoing))
        receive = torch.empty(sum(incoming_sizes), dtype=torch.int32)
        sizes = [len(part) for part in outgoing]
        with self.waits("exchange"):
            dist.all_to_all_single(receive, send, incoming_sizes, sizes, group=self.control)
        return np.split(receive.numpy(), np.cumsum(incoming_sizes)[:-1])

    def deal(self, count: int) -> Iterator[int]:
        """Distribute 0 … count-1 over ranks, on demand. Every rank must call it.

        Not a collective: ranks increment a counter in the rendezvous store, so a rank with short work takes more.
        """
        if self.size == 1:
            yield from range(count)
            return
        store = dist.distributed_c10d._get_default_store()
        deal = next(self.deals)
        if self.is_main and deal >= 2:  # all ranks have finished it: a collective lies between two calls
            store.delete_key(f"grpo/deal {deal - 2}")
        while (item := store.add(f"grpo/deal {deal}", 1) - 1) < count:
            yield item


def start(device: str = "cpu", num_threads: int | None = None, timeout_s: float = 2000.0) -> World:
    """Join the ranks that torchrun started; without torchrun there is one rank.

    Raises UserError for a device that is not available.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    set_threads(num_threads, local_size)
    torch_device = pick_device(device, local_rank)
    if size == 1:
        return World(rank, size, local_rank, local_size, torch_device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if torch_device.type == "cuda" else "gloo", timeout=timeout)
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return World(rank, size, local_rank, local_size, torch_device, control, background)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
