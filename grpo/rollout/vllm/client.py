"""One rollout server as the trainer sees it: facts, weights, a stream of completions. Errors are one line.

A connection that breaks is tried again until the server has been silent for `timeout_s`; requests that were not
answered are asked again, and give the same tokens, because each carries its own seed.
"""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from grpo.rollout.vllm.wire import PROTOCOL, TOKEN_VARIABLE

READ_S = 30.0  # most seconds between two lines; a server that is alive sends two a second
MAX_COPIES = 4096  # of a model that one server may hold
RETRY_S = 1.0  # between two tries
CONNECTION_ERRORS = (OSError, http.client.HTTPException)
FACTS = {
    "version": str,
    "dtype": str,
    "max_model_len": int,
    "copies": int,
}  # what the trainer reads of a server's facts


class ServerProblem(Exception):
    """A server cannot do what was asked; the message names its address."""


class Unusable(ServerProblem):
    """Trying again cannot help: wrong token, model, or weights, or no answer for as long as is allowed."""


class Client:
    """A server at one address."""

    def __init__(self, url: str, token: str, timeout_s: float):
        """timeout_s: without a sign of progress, before the server counts as lost."""
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.read_s = min(READ_S, timeout_s)
        parts = urlsplit(self.url)
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.address = parts.netloc
        self.headers = {"Authorization": f"Bearer {token}"}
        self.sleeps, self.copies = False, 1  # whether it can, and copies of the model, as its facts said last
        self.notice: Callable[[str], None] | None = None  # told once, each time the server has to be waited for

    def answer(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        """What a whole response says. Raises ServerProblem, and CONNECTION_ERRORS."""
        status, answer = response.status, parsed(response.read())
        if status == 401:
            raise Unusable(
                f"{self.url}: refuses the token. {TOKEN_VARIABLE} must be the secret that the server was started with."
            )
        if status in (404, 405) or (status == 200 and answer is None):
            raise Unusable(f"{self.url}: is no rollout server of this project. Start one with launch/vllm_server.sh.")
        if status != 200 or answer is None:
            raise ServerProblem(f"{self.url}: {str((answer or {}).get('error', f'HTTP status {status}'))[:500]}")
        return answer

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, within_s: float | None = None
    ) -> dict[str, Any]:
        """A whole answer, at most within_s after the request. Raises ServerProblem, and CONNECTION_ERRORS."""
        connection = self.kind(self.address, timeout=within_s or self.read_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self.headers)
            return self.answer(connection.getresponse())
        finally:
            connection.close()

    def own_address(self) -> str:
        """The address of this machine by which it reaches the server. Raises CONNECTION_ERRORS."""
        connection = self.kind(self.address, timeout=self.read_s)
        try:
            connection.connect()
            return connection.sock.getsockname()[0]
        finally:
            connection.close()

    def sleep(self) -> None:
        """Let the server free its device's memory until it is asked again. Raises ServerProblem, CONNECTION_ERRORS."""
        self.ask("POST", "/sleep")

    def facts(self) -> dict[str, Any]:
        """What the server holds. Raises ServerProblem, and CONNECTION_ERRORS."""
        facts = self.ask("GET", "/health")
        if facts.get("protocol") != PROTOCOL:
            raise Unusable(
                f"{self.url}: speaks protocol {str(facts.get('protocol'))[:20]}, this version {PROTOCOL}. Use the "
                "same version of this project on both sides."
            )
        for name, kind in FACTS.items():
            if not isinstance(facts.get(name), kind):
                raise Unusable(f"{self.url}: answers are malformed ({name} {str(facts.get(name))[:60]}).")
        if isinstance(facts["copies"], bool) or not 1 <= facts["copies"] <= MAX_COPIES:
            raise Unusable(f"{self.url}: answers are malformed (copies {str(facts['copies'])[:60]}).")
        self.sleeps, self.copies = facts.get("sleeps") is True, facts["copies"]
        return facts

    def wait(
        self, pulse: Callable[[], bool] = lambda: False, ready: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """The server's facts, once it answers. Raises Unusable after timeout_s, or when it answers and is not `ready`.

        ready: whether it holds the weights that it was sent.
        """
        until, notice = time.monotonic() + self.timeout_s, self.notice
        while True:
            try:
                facts = self.facts()
                if ready is None or ready(facts):
                    return facts
                raise Unusable(f"{self.url}: it has restarted and lost the weights that it was sent.")
            except Unusable:
                raise
            except ServerProblem as error:
                problem = str(error).removeprefix(f"{self.url}: ")
            except CONNECTION_ERRORS as error:
                problem = why(error)
            if notice is not None:
                notice(f"{self.url}: {problem}; waiting, at most {self.timeout_s:g} s (rollout_timeout_s)")
                notice = None
            if time.monotonic() > until or pulse():
                raise Unusable(f"{self.url}: no answer for {self.timeout_s:g} s ({problem}).")
            time.sleep(RETRY_S)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of /generate. Raises ServerProblem, and CONNECTION_ERRORS when it breaks off."""
        connection = self.kind(self.address, timeout=self.read_s)
        try:
            connection.request("POST", "/generate", json.dumps(body), self.headers)
            response = connection.getresponse()
            if response.status != 200:
                self.answer(response)
            for text in response:
                if not text.endswith(b"\n"):
                    break
                line = parsed(text)
                if line is None:
                    raise Unusable(f"{self.url}: answers are malformed ({text[:60]!r}).")
                if "error" in line:
                    raise ServerProblem(f"{self.url}: {str(line['error'])[:500]}")
                if "done" in line:
                    return
                yield line
            raise ConnectionResetError("the answer broke off")
        finally:
            with suppress(OSError):
                connection.close()


def parsed(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def why(error: BaseException) -> str:
    """A connection's error in words."""
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, TimeoutError):
        return "it is silent"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
