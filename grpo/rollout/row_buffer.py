"""Keys and values by row, in buffers that rows leave and join without a copy of the rest.

    [rows, kvh, prompt_columns + own_columns, d]     a copy of the prompt, if rows have one, then own tokens

All rows write the token of step t into column prompt_columns + t - base. A row that started later has nothing in the
columns before its own start; `base` moves on when the oldest rows have left.

Where decode steps are replayed (cuda_graph.py) the buffers are *static*: a step reads all columns, those not yet
written too, and takes the column to write from a tensor on the device. The simple path is a buffer that is not static;
tests compare the two.
"""

import numpy as np
import torch
from torch import Tensor

from grpo.rollout.prefill import KeysValues

FIRST_OWN_COLUMNS = 64  # of a new buffer; a full one grows to twice the columns in use
COLUMNS_MULTIPLE = 8  # static buffers have a multiple of this many columns: attention kernels need aligned rows


class RowBuffer:
    """Rows 0 … rows-1 of buffers with room for `capacity` rows.

    The step count is kept twice: `time` on the host, for shapes and slices, and in static buffers `time_on_device`, for
    the replayed step; so is its column. `advance` moves all of them.
    """

    def __init__(self, max_new_tokens: int, static_on: torch.device | None = None):
        """static_on: the device of static buffers; None: the buffers are not static."""
        self.max_new_tokens = max_new_tokens
        self.layers: dict[int, KeysValues] = {}
        self.rows = self.capacity = 0
        self.prompt_columns = 0
        self.own_columns = min(max_new_tokens, FIRST_OWN_COLUMNS)
        self.base = self.time = 0  # steps: the first with a column; finished
        self.time_on_device: Tensor | None = None  # [1] int64, None: not static
        self.column_on_device: Tensor | None = None  # [1] int64, the column that the step writes
        if static_on is not None:
            self.time_on_device, self.column_on_device = (
                torch.zeros(1, dtype=torch.int64, device=static_on) for _ in range(2)
            )

    @property
    def columns(self) -> int:
        """Columns in use before the current step, whose own column has this index."""
        return self.prompt_columns + self.time - self.base

    @property
    def step_time(self) -> int | Tensor:
        """The time as the step reads it: on the device in static buffers."""
        return self.time if self.time_on_device is None else self.time_on_device

    @property
    def step_column(self) -> int | Tensor:
        """The column of the step's own tokens, as the step reads it."""
        return self.columns if self.column_on_device is None else self.column_on_device

    def advance(self) -> None:
        """Call after a step."""
        self.time += 1
        if self.time_on_device is not None and self.column_on_device is not None:
            self.time_on_device += 1
            self.column_on_device += 1

    def join(self, count: int, prompt_columns: int, oldest: int) -> None:
        """Append empty rows. prompt_columns: as many as prompts need now; oldest: see `grow`."""
        prompt_columns = max(prompt_columns, self.prompt_columns)
        if self.rows + count > self.capacity or prompt_columns > self.prompt_columns:
            capacity = max(self.capacity, self.rows + count)
            self._move(capacity, prompt_columns, oldest if self.rows else self.time)
        for tensor in self._tensors():  # stale values of rows that left may be NaN, and are weighed with 0
            tensor[self.rows : self.rows + count] = 0
        self.rows += count

    def copy_prompts(self, layer: int, first: int, prefix: KeysValues, prompts: KeysValues, which: Tensor) -> None:
        """Copy prompts into rows from `first` on: prefix [kvh, Lh, d], prompts [kvh, P, Lp, d], which [b] of P."""
        if layer not in self.layers:
            self._allocate(layer, len(prompts[0]), *prompts)
        for tensor, head, rest in zip(self.layers[layer], prefix, prompts, strict=True):
            rows = tensor[first : first + len(which)]
            rows[:, :, : head.shape[1]] = head
            rows[:, :, head.shape[1] : head.shape[1] + rest.shape[2]] = rest[:, which].transpose(0, 1)

    @property
    def full(self) -> bool:
        """Whether there is no column for another step."""
        return self.time - self.base >= self.own_columns

    def grow(self, oldest: int) -> None:
        """When full: make columns for further steps. oldest: the time at which the oldest row started."""
        self.own_columns = min(self.max_new_tokens, max(FIRST_OWN_COLUMNS, 2 * (self.time - oldest)))
        self._move(self.rows, self.prompt_columns, oldest)

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Write a step's keys and values [B, kvh, d]. Returns those of all steps so far, [B, kvh, n, d].

        Static buffers return all their columns instead.
        """
        if layer not in self.layers:
            self._allocate(layer, key.shape[1], key, value)
        keys, values = self.layers[layer]
        if self.column_on_device is not None:
            keys, values = keys[: self.rows], values[: self.rows]
            keys.index_copy_(2, self.column_on_device, key[:, :, None])
            values.index_copy_(2, self.column_on_device, value[:, :, None])
            return keys, values
        column = self.columns
        keys[: self.rows, :, column] = key
        values[: self.rows, :, column] = value
        return keys[: self.rows, :, : column + 1], values[: self.rows, :, : column + 1]

    def keep(self, rows: np.ndarray) -> np.ndarray:
        """Keep only these rows. Returns which row stands where now: the last rows fill the gaps of those that left."""
        count = len(rows)
        order = np.arange(count)
        order[~np.isin(order, rows)] = rows[rows >= count]
        device = next((tensor.device for tensor in self._tensors()), torch.device("cpu"))
        if 2 * count <= self.capacity:
            # half of the buffer is unused: smaller tensors
            self.capacity = count
            index = torch.from_numpy(order).to(device)
            for layer, (keys, values) in self.layers.items():
                self.layers[layer] = (keys[index], values[index])
        elif len(gaps := np.flatnonzero(order != np.arange(count))):
            # move only the rows that fill gaps, and only the columns in use
            to, source = torch.from_numpy(np.stack([gaps, order[gaps]])).to(device)
            for tensor in self._tensors():
                used = tensor[:, :, : self.columns]
                used[to] = used[source]
        self.rows = count
        return order

    def _allocate(self, layer: int, heads: int, key: Tensor, value: Tensor) -> None:
        shape = (self.capacity, heads, self.prompt_columns + self.own_columns)
        self.layers[layer] = (key.new_zeros(*shape, key.shape[-1]), value.new_zeros(*shape, value.shape[-1]))

    def _move(self, capacity: int, prompt_columns: int, base: int) -> None:
        """Copy into buffers of another size; own columns before the time `base` are dropped."""
        begin, end = self.prompt_columns + base - self.base, self.columns  # own columns to copy
        if self.column_on_device is not None:
            self.own_columns += -(prompt_columns + self.own_columns) % COLUMNS_MULTIPLE
        for layer, both in self.layers.items():
            new_columns = prompt_columns + self.own_columns
            larger = tuple(t.new_zeros(capacity, t.shape[1], new_columns, t.shape[3]) for t in both)
            for old, new in zip(both, larger, strict=True):
                new[: self.rows, :, : self.prompt_columns] = old[: self.rows, :, : self.prompt_columns]
                new[: self.rows, :, prompt_columns : prompt_columns + end - begin] = old[: self.rows, :, begin:end]
            self.layers[layer] = (larger[0], larger[1])
        self.capacity, self.prompt_columns, self.base = capacity, prompt_columns, base
        if self.column_on_device is not None:
            self.column_on_device.fill_(self.columns)

    def _tensors(self) -> list[Tensor]:
        return [tensor for both in self.layers.values() for tensor in both]
