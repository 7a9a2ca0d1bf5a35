"""Random numbers without state: every random number is a hash of the keys of its use.

The uniform that picks token t of completion g of slot s is a hash of (seed, s, g, t), with slot = step*P + p. It does
not depend on rank, world size, the batch or the lengths of other rows, so any number of processes draws the same
numbers, and a resumed run needs no generator state.

The hash is a chain of SplitMix64 finalisers (Steele, Lea and Flood, OOPSLA 2014), one per key.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64, elementwise."""
    with np.errstate(over="ignore"):
        value = (value + _GOLDEN).astype(np.uint64)
        value = (value ^ (value >> np.uint64(30))) * _MIX1
        value = (value ^ (value >> np.uint64(27))) * _MIX2
        return value ^ (value >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integers (arrays broadcast) into uint64; the order of the keys matters.

    >>> bool(hash_keys(1, 2) == hash_keys(2, 1))
    False
    """
    state = np.zeros((), dtype=np.uint64)
    for key in keys:
        state = mix(state ^ mix(np.asarray(key).astype(np.uint64)))
    return state


def uniforms(
    seed: int, slots: np.ndarray, generations: np.ndarray, max_tokens: int, first_tokens: np.ndarray | int = 0
) -> np.ndarray:
    """Uniforms in [0, 1) with 53 bits: one row per (slot, generation), one column per token.

    >>> a = uniforms(7, np.array([0, 1]), np.array([0, 0]), 3)
    >>> b = uniforms(7, np.array([1]), np.array([0]), 2)
    >>> bool((a[1, :2] == b[0]).all())  # a row's numbers depend on the row alone
    True
    """
    rows = hash_keys(seed, 1, slots, generations)[:, None]
    tokens = (np.reshape(first_tokens, (-1, 1)) + np.arange(max_tokens)).astype(np.uint64)  # index in the row
    bits = mix(rows ^ mix(tokens))
    # the upper 53 bits as a float64 in [0, 1)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` rows in an epoch.

    >>> sorted(permutation(3, 0, 4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(hash_keys(seed, 2, epoch, np.arange(size)), kind="stable")
