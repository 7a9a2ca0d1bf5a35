"""Requests that servers work on: sent at once, asked again where a connection breaks, collected as completions."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from grpo.rollout import OnFinished, Request
from grpo.rollout.sampling import Sampling
from grpo.rollout.vllm.client import CONNECTION_ERRORS, Client, ServerProblem, Unusable, why
from grpo.rollout.vllm.wire import NOT_FINITE, packed, unpacked, unpacked_support
from grpo.types import Completion, Pulse

GRACE_S = 5.0  # for a thread that waits for its server to say first why
WAIT_S = 0.05  # for a line of any server, between two pulses
MAX_TRIES = 3  # of requests that a server refuses
MAX_BREAKS = 20  # of a server's connection, without a completion between them


@dataclass(frozen=True)
class Form:
    """What requests have in common."""

    version: str  # of the weights that must answer
    seed: int
    sampling: Sampling
    limit: int  # most tokens of a completion
    num_tokens: int  # ids from here on are never drawn
    stop_ids: list[int]
    stop: list[str]
    timeout_s: float  # without a new token, before a server is lost
    each_copy: bool = False  # requests go to the copies of a server's model in turn, by their keys

    def body(self, requests: dict[int, Request]) -> dict[str, Any]:
        """The body of /generate. requests: by the key that their lines will carry."""
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests.values()))
        place = {ids: i for i, ids in enumerate(prompts)}
        return {
            "version": self.version,
            "prompts": [packed(ids, "<i4") for ids in prompts],
            "requests": [
                [key, place[one.prompt_ids], self.limit, self.seed, one.slot, one.generation, one.num_drawn]
                for key, one in requests.items()
            ],
            "sampling": list(asdict(self.sampling).values()),
            "support_width": self.sampling.support_width,
            "num_tokens": self.num_tokens,
            "stop_ids": self.stop_ids,
            "stop": self.stop,
            "each_copy": self.each_copy,
        }

    def completion(self, request: Request, line: dict[str, Any]) -> Completion:
        """A line as a completion. Raises AttributeError, KeyError, TypeError or ValueError when it is malformed."""
        ids, logprobs = unpacked(line["tokens"], "<i4"), unpacked(line["logprobs"], "<f4")
        width = self.sampling.support_width
        support = unpacked_support(line, width) if width else None
        lengths = {len(ids), len(logprobs), *(() if support is None else (len(support),))}
        inside = len(ids) and int(ids.min()) >= 0 and int(ids.max()) < self.num_tokens
        if line["version"] != self.version or len(lengths) > 1 or len(ids) > self.limit or not inside:
            raise ValueError(f"row {request.row} has {len(ids)} tokens of weights {str(line['version'])[:60]}")
        broken = np.flatnonzero(~(logprobs < NOT_FINITE))
        kept = None if support is None else support[: broken[0] if len(broken) else None]
        if kept is not None and not (
            kept.min(initial=-1) >= -1
            and kept.max(initial=-1) < self.num_tokens
            and (kept == ids[: len(kept), None]).any(1).all()
        ):
            raise ValueError(f"row {request.row} has tokens outside of their support")
        finish, end = ("error", int(broken[0])) if len(broken) else (line["finish"], len(ids))
        return Completion(request.row, ids[:end], logprobs[:end], finish, None if support is None else support[:end])


class Asked:
    """Requests on their way, a thread for each server."""

    def __init__(self, form: Form, shares: Sequence[tuple[Client, dict[int, Request]]]):
        """Send them. shares: of each server, its requests by a key."""
        self.form, self.shares = form, shares
        self.completed: dict[int, Completion] = {}  # by row
        self.missing = {request.row for _, share in shares for request in share.values()}
        self.problem: str | None = None  # why no more will come
        self.lines: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.ended = threading.Event()
        for each in shares:
            threading.Thread(target=self._ask, args=each, daemon=True).start()

    def collect(self, pulse: Pulse = lambda: False, on_finished: OnFinished | None = None) -> dict[int, Completion]:
        """Wait for the rest. By row; fewer when `pulse` returns True or there is a problem. May be called again."""
        drawn: dict[str, Any] = {}  # tokens that each server reports
        last_progress = time.monotonic()
        while self.missing and self.problem is None:
            try:
                kind, content = self.lines.get(timeout=WAIT_S)
            except queue.Empty:
                kind, content = "", None
            if kind == "row":
                self._add(content, on_finished)
                last_progress = time.monotonic()
            elif kind == "progress" and drawn.get(content[0]) != content[1]:
                drawn[content[0]] = content[1]
                last_progress = time.monotonic()
            elif kind == "failed":
                self.problem = content
                self._take_finished(on_finished)
            if time.monotonic() - last_progress > self.form.timeout_s + GRACE_S:
                urls = ", ".join(client.url for client, _ in self.shares)
                self.problem = (
                    f"{urls}: no new token for {self.form.timeout_s:g} s (rollout_timeout_s), {len(self.missing)} "
                    "completions are missing."
                )
            if pulse():
                break
        return self.completed

    def _take_finished(self, on_finished: OnFinished | None) -> None:
        """What other servers have finished behind the line of one that failed."""
        while True:
            try:
                kind, content = self.lines.get_nowait()
            except queue.Empty:
                return
            if kind == "row":
                self._add(content, on_finished)

    def _add(self, one: Completion, on_finished: OnFinished | None) -> None:
        self.completed[one.row] = one
        self.missing.discard(one.row)
        if on_finished is not None:
            on_finished([one])

    def end(self) -> None:
        """Nothing more is wanted: servers drop what is not finished."""
        self.ended.set()

    def _ask(self, client: Client, pending: dict[int, Request]) -> None:
        """Put the completions of these requests into `lines`, asking again for those that a server did not finish."""
        pending, refusals, breaks = dict(pending), 0, 0
        while pending and not self.ended.is_set():
            try:
                for line in client.stream(self.form.body(pending)):
                    if self.ended.is_set():
                        return
                    if "key" not in line:
                        self.lines.put(("progress", (client.url, line["progress"])))
                    elif line["finish"] in ("stop", "length"):
                        self.lines.put(("row", self.form.completion(pending[line["key"]], line)))
                        del pending[line["key"]]
                        breaks = 0
                if pending:
                    raise ServerProblem(f"{client.url}: its answer ended without {len(pending)} completions.")
            except Unusable as problem:
                self.lines.put(("failed", str(problem)))
                return
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                self.lines.put(("failed", f"{client.url}: answers are malformed ({reason})."))
                return
            except (ServerProblem, *CONNECTION_ERRORS) as error:
                refusals += isinstance(error, ServerProblem)
                breaks += 1
                if self.ended.is_set():
                    return
                try:
                    if isinstance(error, ServerProblem) and refusals >= MAX_TRIES:
                        raise error
                    if breaks >= MAX_BREAKS:
                        raise Unusable(f"{client.url}: its answers broke off {breaks} times in a row ({why(error)}).")
                    client.wait(self.ended.is_set, lambda facts: facts["version"] == self.form.version)
                except ServerProblem as problem:
                    self.lines.put(("failed", str(problem)))
                    return
