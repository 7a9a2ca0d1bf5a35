"""The settings `weighting`, `advantage` and `group_filter` as functions of the user's own.

    def my_weighting(num_trained, max_length):
        ...
        return weights  # [N] floats >= 0, of each token of each row; what they divide by is theirs

    def my_advantage(rewards, scores, lengths):
        ...
        return advantages  # [P, G] floats; those of rows without a reward are set to 0

    def my_filter(rewards, scores, lengths, truncated):
        ...
        return keep  # [P] bool, the groups that stay

They get keyword arguments, copies: num_trained [N], the trained tokens of each row of a minibatch over all ranks;
max_length, the setting max_generate_length; rewards [P, G], NaN where a row has none; scores, a dictionary from the
names in `rewards:` to [P, G], NaN where a function gave none; lengths [P, G] in tokens; truncated [P, G] bool,
completions that were cut at max_generate_length. Every rank calls them with the same numbers, and they must return the
same on each; `check_equal` compares what they returned, so that ranks that disagree end instead of waiting for each
other. Rounding may differ between machines: results count as equal when they are 0 in the same places and their sums
over random factors agree.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo.config.algorithm import check_function
from grpo.config.settings import Config
from grpo.runtime.distributed import World
from grpo.training.losses import WEIGHTINGS, row_weights
from grpo.training.user_functions import UserFunction, load_user_function
from grpo.training.user_surrogate import load_surrogate
from grpo.types import FACTS, Table

ROUNDING = 1e-9  # relative

Weighting = Callable[[Sequence[int], int], list[float]]
"""Trained tokens of each row of a minibatch, max_generate_length -> weight of each token of each row."""


def check_functions(cfg: Config) -> dict[str, str]:
    """Call every function of the user's own on a tiny input, before anything large is loaded. Raises UserError.

    Returns what the run's fingerprint has of them, the text of each one's file.
    """
    _, text = load_surrogate(cfg)
    sources = {"surrogate_source": text}
    check_function("weighting", cfg.weighting)
    if cfg.weighting not in WEIGHTINGS:
        own = load_user_function("weighting", cfg.weighting)
        if not any(own_weights(own, [3, 0, 5], cfg.max_generate_length)):
            raise own.wrong("returned the weight 0 for every row: nothing would be trained.")
        sources["weighting_source"] = own.source
    if cfg.advantage is not None:
        check_function("advantage", cfg.advantage)
        own = load_user_function("advantage", cfg.advantage)
        own_advantages(tiny_table(cfg), cfg)
        sources["advantage_source"] = own.source
    check_function("group_filter", cfg.group_filter)
    if cfg.group_filter != "zero_variance":
        own = load_user_function("group_filter", cfg.group_filter)
        own_filter(own, tiny_table(cfg))
        sources["group_filter_source"] = own.source
    return sources


def check_equal(world: World, own: UserFunction, result: np.ndarray) -> None:
    """Raise UserError, on every rank alike, where ranks got different results, arrays of any shape. One gather."""
    if world.size == 1:
        return
    values = np.asarray(result, np.float64).ravel()
    factors = np.random.default_rng(len(values)).uniform(0.5, 1.0, len(values))
    places = zlib.crc32(np.packbits(values != 0).tobytes())
    sums = [len(values), places, values @ factors, np.abs(values) @ factors]
    of_ranks = world.gather_rows(np.array(sums, np.float64))
    allowed = np.array([0.0, 0.0, 1.0, 1.0]) * ROUNDING * of_ranks[0, 3]
    differ = np.flatnonzero((np.abs(of_ranks - of_ranks[0]) > allowed).any(1))
    if len(differ):
        raise own.wrong(
            f"returned one result on rank 0 and another on rank {differ[0]}, from the same numbers. It must return the "
            "same on every process: leave out random numbers, the clock, and what differs between processes."
        )


def tiny_table(cfg: Config) -> Table:
    """Three groups: different rewards; equal ones; and different ones whose last row has none."""
    G, names = cfg.num_generations, list(cfg.rewards)
    rows, weights = np.arange(3 * G), tuple(cfg.rewards.values())
    scores = np.array([[(n % 2 + k) / (k + 1.0) for k in range(len(names))] for n in rows]).reshape(3 * G, -1)
    scores[G : 2 * G] = 1.0
    rewards: np.ndarray = scores @ np.array(weights)
    scores[-1], rewards[-1] = np.nan, np.nan
    facts: dict[str, np.ndarray] = {name: np.zeros(3 * G) for name in FACTS}
    facts["length"] = facts["trained"] = 1.0 + rows % min(3, cfg.max_generate_length)
    facts["stopped"] = (rows % 3 > 0) * 1.0
    return Table(names, scores, rewards, facts, G, reward_weights=weights)


# --- weighting


def load_weighting(cfg: Config, world: World) -> Weighting:
    """The weighting of `weighting`, one of the table in losses.py or the user's own. Raises UserError.

    The user's own takes a collective: every rank must call it.
    """
    if cfg.weighting in WEIGHTINGS:
        return functools.partial(row_weights, cfg.weighting)
    own = load_user_function("weighting", cfg.weighting)

    def checked_weights(num_trained: Sequence[int], max_length: int) -> list[float]:
        weights = own_weights(own, num_trained, max_length)
        check_equal(world, own, np.array(weights))
        return weights

    return checked_weights


def own_weights(own: UserFunction, num_trained: Sequence[int], max_length: int) -> list[float]:
    """Weight of each token of each row by a user's function; 0 for a row without trained tokens, which has none."""
    counts = np.array(num_trained, dtype=np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):  # of rows without trained tokens
        returned = own.call(num_trained=counts.copy(), max_length=max_length)
    weights = np.where(counts > 0, own.array(returned, counts.shape, "a weight for each row"), 0.0)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise own.wrong("returned a weight that is negative or not finite.")
    return [float(weight) for weight in weights]


# --- advantage


def check_advantages(cfg: Config, world: World, advantages: np.ndarray) -> None:
    """`check_equal` of a step's advantages where a function of the user's own computed them."""
    if cfg.advantage is not None:
        check_equal(world, load_user_function("advantage", cfg.advantage), advantages)


def own_advantages(table: Table, cfg: Config) -> np.ndarray:
    """[P, G] advantages by the function that `advantage` names; 0 for rows without a reward. Raises UserError."""
    assert cfg.advantage is not None
    own = load_user_function("advantage", cfg.advantage)
    returned = own.call(**_arguments(table))
    advantages = own.array(returned, table.grouped.shape, "an advantage for each row")
    advantages = np.where(np.isnan(table.grouped), 0.0, advantages)
    if not np.isfinite(advantages).all():
        equal = "where all rewards of a group are equal a standard deviation is 0"
        raise own.wrong(f"returned an advantage that is not finite ({equal}).")
    return advantages


def _arguments(table: Table) -> dict[str, Any]:
    """Copies of what functions of groups get: rewards, scores and lengths."""
    shape = table.grouped.shape
    return dict(
        rewards=table.grouped.copy(),
        scores={name: column.reshape(shape).copy() for name, column in zip(table.names, table.scores.T, strict=True)},
        lengths=table.lengths.reshape(shape),
    )


# --- group filter


def load_group_filter(cfg: Config, world: World) -> Callable[[Table], np.ndarray]:
    """The function that `group_filter` names, from a table to [P] bool, the groups to keep. Raises UserError.

    It takes a collective: every rank must call it.
    """
    own = load_user_function("group_filter", cfg.group_filter)

    def checked_filter(table: Table) -> np.ndarray:
        kept = own_filter(own, table)
        check_equal(world, own, kept)
        return kept

    return checked_filter


def own_filter(own: UserFunction, table: Table) -> np.ndarray:
    """[P] bool: the groups that a user's function keeps."""
    cut = (table.facts["stopped"] == 0) & (table.facts["broken"] == 0)
    returned = own.call(**_arguments(table), truncated=cut.reshape(table.grouped.shape))
    return own.array(returned, table.grouped.shape[:1], "whether each group is kept", bool)
