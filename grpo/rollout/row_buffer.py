"""Keys and values by row, in buffers that rows leave and join without a copy of the rest.

    [rows, kvh, front + room, d]     `front` columns for a copy of the prompt, if rows have one, then own tokens

All rows write the token of step t into column front + t - base. A row that began later has nothing in the columns
before; `base` moves on when the oldest rows have left.

Where steps are to be replayed (step_graph.py) the buffers are *steady*: a step reads all columns, those to come too,
and the column it writes is a number on the device.
"""

import numpy as np
import torch
from torch import Tensor

from grpo.rollout.prefill import KeysValues

FIRST_ROOM = 64  # own tokens that room is made for at first; then for twice as many as there are
WHOLE = 8  # columns of steady buffers are a multiple of this: attention kernels want aligned rows


class RowBuffer:
    """Rows 0 … rows-1 of buffers that may hold more."""

    def __init__(self, max_new_tokens: int, steady_on: torch.device | None = None):
        """steady_on: the device of steady buffers; None: they are not."""
        self.max_new_tokens = max_new_tokens
        self.layers: dict[int, KeysValues] = {}
        self.rows = self.capacity = 0
        self.front = 0
        self.room = min(max_new_tokens, FIRST_ROOM)
        self.base = self.time = 0
        self.clock: Tensor | None = None  # [1] the time, where buffers are steady
        self.at: Tensor | None = None  # [1] the step's own column
        if steady_on is not None:
            self.clock, self.at = (torch.zeros(1, dtype=torch.int64, device=steady_on) for _ in range(2))

    @property
    def columns(self) -> int:
        """In use, without the step's own."""
        return self.front + self.time - self.base

    @property
    def now(self) -> int | Tensor:
        """The time, as a step may read it."""
        return self.time if self.clock is None else self.clock

    @property
    def column(self) -> int | Tensor:
        """The step's own, as a step may read it."""
        return self.columns if self.at is None else self.at

    def advance(self) -> None:
        """After a step."""
        self.time += 1
        if self.clock is not None and self.at is not None:
            self.clock += 1
            self.at += 1

    def join(self, count: int, front: int, oldest: int) -> None:
        """Append rows that have nothing yet. front: columns that prompts need now; oldest: see `make_room`."""
        front = max(front, self.front)
        if self.rows + count > self.capacity or front > self.front:
            self._move(max(self.capacity, self.rows + count), front, oldest if self.rows else self.time)
        for tensor in self._tensors():  # what a row that left has put there may be no number
            tensor[self.rows : self.rows + count] = 0
        self.rows += count

    def copy_prompts(self, layer: int, first: int, head: KeysValues, stem: KeysValues, which: Tensor) -> None:
        """Give rows from `first` on a copy of their prompt: head [kvh, Lh, d], stem [kvh, P, Lp, d], which [b] of P."""
        if layer not in self.layers:
            self._make(layer, len(stem[0]), *stem)
        for tensor, begin, rest in zip(self.layers[layer], head, stem, strict=True):
            mine = tensor[first : first + len(which)]
            mine[:, :, : begin.shape[1]] = begin
            mine[:, :, begin.shape[1] : begin.shape[1] + rest.shape[2]] = rest[:, which].transpose(0, 1)

    @property
    def full(self) -> bool:
        """Whether there is no column for another step."""
        return self.time - self.base >= self.room

    def make_room(self, oldest: int) -> None:
        """When full: columns for further steps. oldest: when the oldest row began."""
        self.room = min(self.max_new_tokens, max(FIRST_ROOM, 2 * (self.time - oldest)))
        self._move(self.rows, self.front, oldest)

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Put a step's keys and values [B, kvh, d]; those of all columns so far, [B, kvh, n, d]; steady: of all."""
        if layer not in self.layers:
            self._make(layer, key.shape[1], key, value)
        at = self.columns
        keys, values = self.layers[layer]
        if self.at is not None:
            keys, values = keys[: self.rows], values[: self.rows]
            keys.index_copy_(2, self.at, key[:, :, None])
            values.index_copy_(2, self.at, value[:, :, None])
            return keys, values
        keys[: self.rows, :, at] = key
        values[: self.rows, :, at] = value
        return keys[: self.rows, :, : at + 1], values[: self.rows, :, : at + 1]

    def keep(self, rows: np.ndarray) -> np.ndarray:
        """Only these rows go on. Returns which row stands where now: the last ones fill the gaps of those that left."""
        count = len(rows)
        order = np.arange(count)
        order[~np.isin(order, rows)] = rows[rows >= count]
        device = next((tensor.device for tensor in self._tensors()), torch.device("cpu"))
        if 2 * count <= self.capacity:
            self.capacity = count
            index = torch.from_numpy(order).to(device)
            for layer, (keys, values) in self.layers.items():
                self.layers[layer] = (keys[index], values[index])
        elif len(gaps := np.flatnonzero(order != np.arange(count))):
            to, source = torch.from_numpy(np.stack([gaps, order[gaps]])).to(device)
            for tensor in self._tensors():
                used = tensor[:, :, : self.columns]
                used[to] = used[source]
        self.rows = count
        return order

    def _make(self, layer: int, heads: int, key: Tensor, value: Tensor) -> None:
        shape = (self.capacity, heads, self.front + self.room, key.shape[-1])
        self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))

    def _move(self, capacity: int, front: int, base: int) -> None:
        """Into buffers of another size, without the own columns before `base`."""
        begun, ended = self.front + base - self.base, self.columns
        if self.at is not None:
            self.room += -(front + self.room) % WHOLE
        for layer, both in self.layers.items():
            larger = tuple(t.new_zeros(capacity, t.shape[1], front + self.room, t.shape[3]) for t in both)
            for old, new in zip(both, larger, strict=True):
                new[: self.rows, :, : self.front] = old[: self.rows, :, : self.front]
                new[: self.rows, :, front : front + ended - begun] = old[: self.rows, :, begun:ended]
            self.layers[layer] = (larger[0], larger[1])
        self.capacity, self.front, self.base = capacity, front, base
        if self.at is not None:
            self.at.fill_(self.columns)

    def _tensors(self) -> list[Tensor]:
        return [tensor for both in self.layers.values() for tensor in both]
