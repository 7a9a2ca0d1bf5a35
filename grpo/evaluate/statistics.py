"""Intervals of a measured accuracy, and tests of a difference: closed forms, exact where integers allow it."""

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import TypeVar

V = TypeVar("V", bound=Hashable)
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: (low, high), 95 % by default; (0, 1) for a total of 0.

    >>> [round(x, 4) for x in wilson(88, 100)], [round(x, 4) for x in wilson(0, 10)]
    ([0.8019, 0.93], [0.0, 0.2775])
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    below = 1 + z * z / total
    low = 0.0 if correct == 0 else (centre - spread) / below
    return max(0.0, low), 1.0 if correct == total else min(1.0, (centre + spread) / below)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of the hypothesis that two systems are equally good, from the questions that differ.

    Under it each such question favours either system with probability 1/2: twice the smaller tail of the binomial
    distribution, at most 1.

    >>> mcnemar(0, 5), mcnemar(3, 3), mcnemar(0, 0)
    (0.0625, 1.0, 1.0)
    """
    differ, fewer = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for i in range(fewer):  # the binomial coefficients up to `fewer`, each from the one before
        term = term * (differ - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**differ)  # whole numbers of any size divide exactly


def paired_difference(only_first: int, only_second: int, total: int, z: float = Z95) -> tuple[float, float, float]:
    """The second accuracy minus the first, with the 95 % interval of Bonett and Price (2012).

    Their interval adds one question to each kind of disagreement, which keeps its coverage for small numbers.

    >>> [round(x, 4) for x in paired_difference(2, 6, 50)]
    [0.08, -0.0404, 0.1943]
    """
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    spread = z * math.sqrt((first + second - (second - first) ** 2) / (total + 2))
    centre = second - first
    return (only_second - only_first) / max(1, total), max(-1.0, centre - spread), min(1.0, centre + spread)


def pass_at_k(completions: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k completions is correct (arXiv 2107.03374).

        1 - C(n - c, k) / C(n, k), n completions of which c are correct

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 2)
    (0.25, 1.0, 0.0)
    """
    if not 1 <= k <= completions or not 0 <= correct <= completions:
        raise ValueError(f"k {k} and correct {correct} must fit {completions} completions")
    return 1.0 - math.comb(completions - correct, k) / math.comb(completions, k)


def majority(votes: Sequence[V | None]) -> V | None:
    """The answer with the most votes, the first one among equals. None is not a vote; None without any vote.

    >>> majority(["3", None, "4", "4", None, None]), majority(["2", "1"]), majority([None])
    ('4', '2', None)
    """
    counts: dict[V, int] = {}
    for vote in votes:
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
    return max(counts, key=lambda vote: counts[vote]) if counts else None


def of_several_answers(
    right: Sequence[Sequence[bool]], votes: Sequence[Sequence[Hashable | None]] | None
) -> dict[str, tuple[float, float]]:
    """pass@k for k = 1, 2, 4 … n and maj@n over questions with n answers each: the mean, and its standard error.

    pass@1 is the mean share of right answers. maj@n is the share of questions whose majority is right: the answer with
    the most votes, the first one sampled among equals, judged by the first answer that voted for it. A question without
    any vote is not answered right. Questions are the independent draws of the standard error, NaN for a single one.

    votes: what each answer says, equal for equal answers, None where nothing was read; None: no maj@n.

    >>> of_several_answers([[True, False], [False, False]], [["4", "5"], [None, None]])
    {'pass@1': (0.25, 0.25), 'pass@2': (0.5, 0.5), 'maj@2': (0.5, 0.5)}
    """
    num_each = len(right[0])
    ks = sorted({2**i for i in range(num_each.bit_length()) if 2**i <= num_each} | {num_each})
    shares = {f"pass@{k}": [pass_at_k(num_each, sum(answers), k) for answers in right] for k in ks}
    if votes is not None:
        winners = [majority(own) for own in votes]
        shares[f"maj@{num_each}"] = [
            float(winner is not None and answers[own.index(winner)])
            for winner, answers, own in zip(winners, right, votes, strict=True)
        ]
    return {name: mean_with_error(values) for name, values in shares.items()}


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, NaN for one value.

    >>> mean_with_error([1.0, 0.0, 0.0, 1.0])
    (0.5, 0.28867513459481287)
    """
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values, mean) / math.sqrt(len(values)) if len(values) > 1 else math.nan
