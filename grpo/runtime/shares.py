"""How the work of a step is shared out: for how many ranks it is cut, and into which parts."""

from collections.abc import Callable

from grpo.config.settings import Config

DETERMINISTIC_SHARES = 8  # ranks that are all busy with `deterministic`; more of them wait on small steps


def shares_of(cfg: Config, ranks: int) -> int:
    """For how many ranks to cut: those that there are, or with `deterministic` always the same number."""
    return DETERMINISTIC_SHARES if cfg.deterministic else ranks


def next_multiple(count: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `count`."""
    return -(-count // of) * of


def split_evenly(num_items: int, num_parts: int) -> list[range]:
    """Contiguous parts whose sizes differ by at most one.

    >>> split_evenly(5, 2)
    [range(0, 2), range(2, 5)]
    """
    edges = [num_items * part // num_parts for part in range(num_parts + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def cut_for(shares: int, max_tokens: int, cut: Callable[[int], list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Micro-batches as `cut` makes them from a budget of tokens: the smallest that gives no more than needed.

    Needed are as many as `max_tokens` gives, and as many for each of the shares.

    >>> below_40_pairs = lambda budget: [(0, 1, 2, 3)] if budget >= 40 else [(0, 1), (2, 3)]
    >>> cut_for(2, 100, below_40_pairs)
    [(0, 1), (2, 3)]
    """
    needed = next_multiple(len(cut(max_tokens)), shares)
    low, high = 1, max_tokens  # `high` gives no more than needed
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= needed:
            high = middle
        else:
            low = middle + 1
    return cut(high)
