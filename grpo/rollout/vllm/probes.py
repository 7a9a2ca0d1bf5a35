"""Fixed texts whose continuations by a server are compared with the trainer's log-probs, after each transfer.

Every copy of the model that the server holds continues every text, and the copy that is furthest off counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.rollout import Request
from grpo.types import Completion

TEXTS = (
    "The farmer has 12 sheep and sells 5 of them. How many sheep are left? Let us count step by step:",
    "def mean(values):\n    return sum(values) / len(values)\n\nThe mean of 3, 5 and 10 is",
    "小明有八个苹果，又买了三个。现在他一共有",
)
TOKENS = 8  # of a continuation
SLOT = 2**63  # no question's


def requests_of(texts: Sequence[tuple[int, ...]], copies: int) -> list[Request]:
    """A request for each text and copy. texts: their ids. Request number r is for copy r % copies.

    >>> [(one.generation, one.prompt_ids) for one in requests_of([(5, 6), (7,)], 2)]
    [(0, (5, 6)), (0, (5, 6)), (1, (7,)), (1, (7,))]
    """
    places = [(n, text) for n, text in enumerate(texts) for _ in range(copies)]
    return [Request(row, SLOT, n, text) for row, (n, text) in enumerate(places)]


@dataclass(frozen=True)
class Found:
    """What a comparison has found."""

    gap: float  # mean |log-prob - the trainer's| of the copy that is furthest off, in nats; Inf: one drew no token
    words: str  # where, and how far


def compare(completions: Sequence[Completion], scored: Sequence[np.ndarray], copies: int) -> Found:
    """Compare continuations with the trainer's log-probs of their tokens. completions: of all requests, in any order.

    >>> draw = lambda row, *logprobs: Completion(row, np.arange(len(logprobs)), np.array(logprobs), "length")
    >>> compare([draw(0, -1.0, -2.0), draw(1, -1.0, -3.0)], [np.array([-1.0, -2.0])] * 2, 2)
    Found(gap=0.5, words='0.5 nats on average, most in text 1, token 2, copy 2: -3 there, -2 here')
    >>> compare([draw(0, -1.0), draw(1)], [np.array([-1.0]), np.zeros(0)], 2)
    Found(gap=inf, words='a logit that is not finite in text 1, copy 2')
    """
    for one in completions:
        if one.finish == "error" or not len(one.token_ids):
            return Found(
                np.inf, f"a logit that is not finite in text {one.row // copies + 1}, copy {_copy(one, copies)}"
            )
    gaps = [np.abs(own - one.sampler_logprobs) for own, one in zip(scored, completions, strict=True)]
    of_copies: dict[int, list[np.ndarray]] = {}
    for one, gap in zip(completions, gaps, strict=True):
        of_copies.setdefault(one.row % copies, []).append(gap)
    means = {copy: float(np.concatenate(found).mean()) for copy, found in of_copies.items()}
    furthest = max(means, key=lambda copy: means[copy])
    candidates = [n for n, one in enumerate(completions) if one.row % copies == furthest]
    worst = max(candidates, key=lambda n: float(gaps[n].max()))
    at, one = int(gaps[worst].argmax()), completions[worst]
    words = (
        f"{means[furthest]:.3g} nats on average, most in text {one.row // copies + 1}, token {at + 1}, copy "
        f"{_copy(one, copies)}: {one.sampler_logprobs[at]:.4g} there, {scored[worst][at]:.4g} here"
    )
    return Found(means[furthest], words)


def _copy(one: Completion, copies: int) -> int:
    return one.row % copies + 1
