"""Which rows decode at once: as many as a budget of tokens holds, whole groups where they fit.

A row takes room for its prompt and for the longest completion there may be, so that memory which sufficed at the
beginning suffices to the end. Who comes when depends on the requests and on what was sampled, never on time.
"""

from collections import deque
from collections.abc import Sequence
from itertools import groupby

from grpo.rollout import Request


class Admission:
    """Requests that wait, in their order."""

    def __init__(
        self, requests: Sequence[Request], max_new_tokens: int, max_tokens: int | None, max_rows: int, shares: bool
    ):
        """max_tokens: of prompts and completions in the cache at once; None: no limit. shares: a prompt counts once."""
        groups = groupby(requests, key=lambda request: request.prompt_ids)
        self.waiting = deque(list(group) for _, group in groups)
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.shares = shares

    def cost(self, rows: Sequence[Request]) -> int:
        """Tokens that these rows take room for."""
        prompts = [row.prompt_ids for row in rows]
        held = len(set(prompts)) if self.shares else len(rows)
        return held * max(map(len, prompts)) + self.max_new_tokens * len(rows)  # all padded to the longest

    def fits(self, rows: Sequence[Request]) -> bool:
        """Whether these rows may be in the cache together."""
        return len(rows) <= self.max_rows and (self.max_tokens is None or self.cost(rows) <= self.max_tokens)

    def admit(self, here: Sequence[Request]) -> list[Request]:
        """Rows that may begin beside those that are here: whole groups; of a group that never fits, a part.

        >>> rows = [Request(n, n // 2, n % 2, (n // 2,)) for n in range(4)]
        >>> queue = Admission(rows, max_new_tokens=5, max_tokens=14, max_rows=9, shares=True)
        >>> [row.row for row in queue.admit([])], [row.row for row in queue.admit(rows[:1])]
        ([0, 1], [])
        """
        admitted: list[Request] = []
        while self.waiting and self.fits([*here, *admitted, *self.waiting[0]]):
            admitted += self.waiting.popleft()
        if not here and not admitted and self.waiting:
            group = self.waiting.popleft()
            count = 1
            while count < len(group) and self.fits(group[: count + 1]):
                count += 1
            admitted = group[:count]
            if group[count:]:
                self.waiting.appendleft(group[count:])
        return admitted
