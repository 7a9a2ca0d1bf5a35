"""Which queries see which keys in a flat row: the parts of its attention, and the kernel calls that a part is on CPU.

A sliding window hides keys: a token at position i of its text sees the positions i - window < j <= i. Segments that
stand apart in the flat row are still one text: the first query of a completion stands `lag` tokens behind the first key
of its prompt. A segment is cut into blocks of queries, each a call over the keys that any of its queries sees, with a
mask of that size; a query that sees no key of a part is in none of its calls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALONE = 256  # tokens from which a segment is a CPU call of its own, and not a padded row among others
SPARED_SCORES = 2**16  # padded scores per head that a call of its own for shorter segments must save
BLOCK = 256  # queries of a call with a window at most: it computes up to window + BLOCK scores for each
SMALLEST_BLOCK = 64  # and at least, for small windows


class Block(NamedTuple):
    """One call of the CPU kernel: `queries` see `keys`, counted from the part's starts, where the mask lets them."""

    queries: slice
    keys: slice
    causal: bool
    window: int = 0  # > 0: a query sees the last so many tokens, itself included, and not those behind it
    lag: int = 0  # with a window: tokens from the first key to the first query

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[queries, keys], 0 where a key is seen and -inf elsewhere; None: all are seen, or causally."""
        if not self.window:
            return None
        num_queries, num_keys = (where.stop - where.start for where in (self.queries, self.keys))
        distance = self.lag + torch.arange(num_queries)[:, None] - torch.arange(num_keys)
        visible = (distance >= 0) & (distance < self.window)
        return None if visible.all() else torch.zeros(1, dtype=dtype).where(visible, -torch.inf)


class Rows(NamedTuple):
    """Segments as padded rows [b, c] of one call, and back."""

    source: Tensor  # [b c] int64, which token of the flat row stands there; padding: the first segment's first
    padding: Tensor  # [b, c] bool
    tokens: Tensor  # [n] int64, the tokens of the flat row in the order of the rows
    places: Tensor  # [n] int64, where in [b c] each stands


@dataclass(frozen=True)
class Part:
    """Pairs of segments: the queries of segment i see the keys of segment i, all of them or causally.

    queries, keys: where the segments stand in the flat row, one behind the other. Causal: both are the same.
    """

    queries: slice
    keys: slice
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool
    offsets: Tensor | None = None  # [2, segments + 1] int32 on the device, cumulative lengths; CPU: None

    @cached_property
    def pairs(self) -> list[tuple[slice, slice]]:
        """Segments as (queries, keys), counted from the start of `queries` and of `keys`; none is empty."""
        both = zip(behind(0, self.query_lengths), behind(0, self.key_lengths), strict=True)
        return [(queries, keys) for queries, keys in both if _length(queries) and _length(keys)]

    @cached_property
    def calls(self) -> list[Block | Rows]:
        """The calls of the CPU kernel: pairs of segments, and rows of short segments that see themselves."""
        if not self.causal:
            return [Block(*pair, False) for pair in self.pairs]
        return causal_calls([segment for segment, _ in self.pairs])


@dataclass(frozen=True)
class WindowedPart(Part):
    """A part with a window: causal, or queries that stand some tokens behind the keys of an earlier segment."""

    window: int = 0
    seen: tuple[tuple[slice, slice, int], ...] = ()  # queries, keys, lag; of a part that is not causal

    @cached_property
    def calls(self) -> list[Block | Rows]:
        """See Part."""
        if not self.causal:
            return list(chain.from_iterable(_blocks(*pair, self.window) for pair in self.seen))
        segments = [segment for segment, _ in self.pairs]
        is_long = [segment.stop - segment.start > self.window for segment in segments]
        within = [segment for segment, cut in zip(segments, is_long, strict=True) if not cut]
        beyond = [segment for segment, cut in zip(segments, is_long, strict=True) if cut]
        blocks = (_blocks(segment, segment, 0, self.window) for segment in beyond)
        return [*causal_calls(within), *chain.from_iterable(blocks)]


def positions_of(prefix: int, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> np.ndarray:
    """Position of each token in its text, [S] int64: a prompt continues the prefix, a completion its prompt.

    >>> positions_of(2, [3], [(2, 1)]).tolist()
    [0, 1, 2, 3, 4, 5, 6, 5]
    """
    starts = [0, *(prefix for _ in prompts)]
    starts += [prefix + prompt for prompt, own in zip(prompts, completions, strict=True) for _ in own]
    lengths = [prefix, *prompts, *(length for own in completions for length in own)]
    return np.concatenate([start + np.arange(n, dtype=np.int64) for start, n in zip(starts, lengths, strict=True)])


def parts_of(prefix: int, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> list[Part]:
    """The parts of a row [prefix | prompts | completions], from lengths in tokens; completions: those of each prompt.

    Every segment sees itself causally, a completion sees its prompt, and all see the prefix.
    """
    own = [length for lengths in completions for length in lengths]
    start = prefix + sum(prompts)
    total = start + sum(own)
    segments = tuple(length for length in (prefix, *prompts, *own) if length)
    parts = [Part(slice(0, total), slice(0, total), segments, segments, True)]
    if total > start:
        groups = tuple(sum(lengths) for lengths in completions)
        parts.append(Part(slice(start, total), slice(prefix, start), groups, tuple(prompts), False))
    if 0 < prefix < total:
        parts.append(Part(slice(prefix, total), slice(0, prefix), (total - prefix,), (prefix,), False))
    return parts


def windowed_parts(
    prefix: int, prompts: Sequence[int], completions: Sequence[Sequence[int]], window: int
) -> list[Part]:
    """`parts_of` where a token sees the last `window` tokens of its text, itself included."""
    whole = parts_of(prefix, prompts, completions)[0]
    parts: list[Part] = [
        WindowedPart(whole.queries, whole.keys, whole.query_lengths, whole.key_lengths, True, window=window)
    ]
    own = [length for lengths in completions for length in lengths]
    prompt_of = [prompt for prompt, lengths in enumerate(completions) for _ in lengths]
    start, total = prefix + sum(prompts), whole.queries.stop

    def add(queries: slice, keys: slice, seen: list[tuple[slice, slice, int]]) -> None:
        parts.append(WindowedPart(queries, keys, (), (), False, window=window, seen=tuple(seen)))

    where = behind(0, prompts)
    seen = [(mine, where[p], prompts[p]) for mine, p in zip(behind(0, own), prompt_of, strict=True)]
    if total > start:
        add(slice(start, total), slice(prefix, start), seen)
    if 0 < prefix < total:
        lags = [prefix] * len(prompts) + [prefix + prompts[p] for p in prompt_of]
        mine = behind(0, [*prompts, *own])
        keys = slice(0, prefix)
        add(slice(prefix, total), keys, [(queries, keys, lag) for queries, lag in zip(mine, lags, strict=True)])
    return parts


def offsets_of(part: Part) -> np.ndarray:
    """Cumulative lengths of the segments' queries and keys, [2, segments + 1]."""
    return np.cumsum([(0, *part.query_lengths), (0, *part.key_lengths)], axis=1)


def behind(start: int, lengths: Sequence[int]) -> list[slice]:
    """Slices of these lengths, one behind the other."""
    ends = (start + np.cumsum(lengths, dtype=np.int64)).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def causal_calls(segments: list[slice]) -> list[Block | Rows]:
    """The calls of the CPU kernel for segments that see themselves causally."""
    ordered = sorted(segments, key=_length, reverse=True)
    short = [segment for segment in ordered if _length(segment) < ALONE]
    calls: list[Block | Rows] = [Block(segment, segment, True) for segment in ordered if _length(segment) >= ALONE]
    for run in similar(list(map(_length, short))):
        similar_ones = short[run]
        calls.append(_rows(similar_ones) if len(similar_ones) > 1 else Block(short[run.start], short[run.start], True))
    return calls


def _length(segment: slice) -> int:
    return segment.stop - segment.start


def similar(lengths: list[int]) -> list[slice]:
    """Lengths in descending order, cut into runs where padding to the longest would cost more than another call.

    >>> similar([600, 500, 20, 9])
    [slice(0, 2, None), slice(2, 4, None)]
    """
    if not lengths:
        return []
    starts: list[int] = []
    squares = np.square(np.array(lengths, dtype=np.int64))
    after = squares[::-1].cumsum()[::-1].tolist()  # sum of squares from here on
    for i, length in enumerate(lengths):
        longest = lengths[starts[-1]] if starts else 0
        spared = longest**2 * (len(lengths) - i) - after[i]
        if not starts or (2 * length <= longest and spared >= SPARED_SCORES):
            starts.append(i)
    return [slice(i, j) for i, j in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _rows(segments: list[slice]) -> Rows:
    lengths = np.array([segment.stop - segment.start for segment in segments])
    starts = np.array([segment.start for segment in segments])
    steps = np.arange(lengths.max())
    padding = steps >= lengths[:, None]
    index = np.where(padding, starts[0], starts[:, None] + steps)
    places = np.flatnonzero(~padding)
    arrays = (index.ravel(), padding, index.ravel()[places], places)
    return Rows(*map(torch.from_numpy, arrays))


def _blocks(queries: slice, keys: slice, lag: int, window: int) -> Iterator[Block]:
    """The calls of one pair of segments.

    >>> [(b.queries, b.keys, b.lag) for b in _blocks(slice(0, 9), slice(0, 4), 4, 6)]
    [(slice(0, 5, None), slice(0, 4, None), 4)]
    """
    block = min(BLOCK, max(SMALLEST_BLOCK, window // 2))
    num_keys = keys.stop - keys.start
    last = min(queries.stop - queries.start, num_keys - 1 + window - lag)  # queries from here on see none of the keys
    for first in range(0, last, block):
        stop = min(first + block, last)
        lowest, highest = max(0, lag + first - window + 1), min(num_keys, lag + stop)
        yield Block(
            slice(queries.start + first, queries.start + stop),
            slice(keys.start + lowest, keys.start + highest),
            False,
            window,
            lag + first - lowest,
        )
