"""Which rows decode at once: as many as a budget of tokens holds, whole groups where they fit.

A row is counted with its prompt and the longest completion it may get, so that memory which suffices at the start
suffices to the end. The order depends on the requests and on what was sampled, never on time.
"""

from collections import deque
from collections.abc import Sequence
from itertools import groupby

from grpo.rollout import Request


class Admission:
    """Requests that wait, in their order."""

    def __init__(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        max_tokens: int | None,
        max_rows: int,
        shares_prompts: bool,
    ):
        """max_tokens: of prompts and completions in the cache at once; None: no limit.

        shares_prompts: the cache holds a prompt once for all its rows.
        """
        groups = groupby(requests, key=lambda request: request.prompt_ids)
        self.waiting = deque(list(group) for _, group in groups)
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.shares_prompts = shares_prompts

    def cost(self, rows: Sequence[Request]) -> int:
        """Tokens of cache that these rows need."""
        prompts = [row.prompt_ids for row in rows]
        prompt_copies = len(set(prompts)) if self.shares_prompts else len(rows)
        return prompt_copies * max(map(len, prompts)) + self.max_new_tokens * len(rows)  # padded to the longest prompt

    def fits(self, rows: Sequence[Request]) -> bool:
        """Whether these rows may be in the cache together."""
        return len(rows) <= self.max_rows and (self.max_tokens is None or self.cost(rows) <= self.max_tokens)

    def admit(self, active: Sequence[Request]) -> list[Request]:
        """Take rows that may start beside the active ones: whole groups, or part of a group too large to ever fit.

        >>> rows = [Request(n, n // 2, n % 2, (n // 2,)) for n in range(4)]
        >>> queue = Admission(rows, max_new_tokens=5, max_tokens=14, max_rows=9, shares_prompts=True)
        >>> [row.row for row in queue.admit([])], [row.row for row in queue.admit(rows[:1])]
        ([0, 1], [])
        """
        admitted: list[Request] = []
        while self.waiting and self.fits([*active, *admitted, *self.waiting[0]]):
            admitted += self.waiting.popleft()
        if not active and not admitted and self.waiting:
            # the next group does not fit even alone: as many of its rows as fit, at least one
            group = self.waiting.popleft()
            count = 1
            while count < len(group) and self.fits(group[: count + 1]):
                count += 1
            admitted = group[:count]
            if group[count:]:
                self.waiting.appendleft(group[count:])
        return admitted
