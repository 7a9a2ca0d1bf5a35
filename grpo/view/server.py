"""What the page asks for, on the loopback interface, read-only.

A run is asked for by its number, so no name of a file ever comes from the browser. Requests whose Host is not this
machine are refused, so a foreign page cannot reach the data by a name of its own (DNS rebinding).
"""

import json
import threading
import time
from collections.abc import Callable
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from grpo.errors import UserError, warn
from grpo.view.export import report
from grpo.view.page_files import PARTS, TYPES, index, part
from grpo.view.runs import RunLogs, find_runs

ADDRESS = "127.0.0.1"
HOSTS = {"127.0.0.1", "localhost", "[::1]"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_ROWS_ASKED = 500
MAX_SEARCHED = 1000  # characters of a text that is searched for
LOOK_FOR_RUNS_S = 5.0


class Asked(Exception):
    """A request that has no answer: status and one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class Logs:
    """The logs of all runs, one request at a time. The number of a run stays."""

    def __init__(self, roots: list[Path]):
        """Raises UserError where no run is found."""
        self.roots = roots
        self.lock = threading.Lock()
        self.runs: list[RunLogs] = []
        self.looked = -LOOK_FOR_RUNS_S
        self._look()

    def _look(self) -> None:
        """Add runs that have begun since the last look."""
        if time.monotonic() - self.looked < LOOK_FOR_RUNS_S:
            return
        known = {run.folder for run in self.runs}
        try:
            self.runs += [RunLogs(name, folder) for name, folder in find_runs(self.roots) if folder not in known]
        except UserError:
            if not self.runs:
                raise
        self.looked = time.monotonic()

    def refresh(self) -> None:
        """Read what was written since the last call, of all runs."""
        with self.lock:
            self._look()
            for run in self.runs:
                run.refresh()

    def answer(self, name: str, query: dict[str, str]) -> tuple[str, bytes]:
        """Type and content of an answer. Raises Asked."""
        if name == "runs":
            self.refresh()
            with self.lock:
                return _json({"now": time.time(), "runs": [run.about() for run in self.runs]})
        if name == "export":
            numbers = _numbers(query, "runs", len(self.runs))
            with self.lock:
                return "text/html; charset=utf-8", report([self.runs[number] for number in numbers])
        run = self._run(query)
        with self.lock:
            if name == "metrics":
                return _json(run.metrics.packed())
            if name == "rows":
                same = _number(query, "generation", 2**31) == run.rollouts.generation
                first = _number(query, "first", 2**31) if same else 0
                return "application/octet-stream", run.rollouts.packed(first=min(first, len(run.rollouts)))
            if name == "texts":
                rows = _numbers(query, "rows", len(run.rollouts))
                return _json(run.rollouts.shown(rows, whole=query.get("whole") == "1"))
            if name == "search":
                return _json(run.rollouts.search(_text(query)))
            if name == "token_rows":
                return _json([number for place in run.tokens.where for number in place])
            if name == "tokens":
                return _json(run.tokens.of(_number(query, "step", 2**31), _number(query, "row", 2**31)))
        raise Asked(404, "there is no such thing to ask for")

    def _run(self, query: dict[str, str]) -> RunLogs:
        return self.runs[_number(query, "run", len(self.runs))]


def _json(value: Any) -> tuple[str, bytes]:
    """In ASCII: a lone surrogate has an escape and no UTF-8."""
    return "application/json", json.dumps(value, allow_nan=False).encode("ascii")


def _number(query: dict[str, str], name: str, below: int) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) < below):
        raise Asked(400, f"{name}: a whole number below {below} is needed")
    return int(text)


def _numbers(query: dict[str, str], name: str, below: int) -> list[int]:
    words = query.get(name, "").split(",")
    if len(words) > MAX_ROWS_ASKED:
        raise Asked(400, f"{name}: at most {MAX_ROWS_ASKED} numbers")
    return [_number({name: word}, name, below) for word in words]


def _text(query: dict[str, str]) -> str:
    text = query.get("text", "")
    if not 0 < len(text) <= MAX_SEARCHED:
        raise Asked(400, f"text: 1 to {MAX_SEARCHED} characters are needed")
    return text


class Handler(BaseHTTPRequestHandler):
    """Answers GET; every other method is refused by the base class."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version = "grpo.view"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        try:
            kind, content = self._content()
        except Asked as error:
            self._send(error.status, "text/plain; charset=utf-8", f"{error}\n".encode())
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True
        else:
            self._send(200, kind, content)

    def _content(self) -> tuple[str, bytes]:
        host = self.headers.get("Host", "")
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if name not in HOSTS:
            raise Asked(403, "this page is for this machine alone: open it as http://127.0.0.1")
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise Asked(400, "the address cannot be read") from None
        if url.path == "/":
            return "text/html; charset=utf-8", index()
        if url.path.startswith("/page/") and (file := url.path[len("/page/") :]) in PARTS:
            return TYPES[file.rpartition(".")[2]], part(file)
        if url.path.startswith("/api/"):
            try:
                query = {key: values[-1] for key, values in parse_qs(url.query, max_num_fields=20).items()}
            except ValueError as error:
                raise Asked(400, f"the query cannot be read: {error}") from None
            return self.server.logs.answer(url.path[len("/api/") :], query)
        raise Asked(404, "there is no such page")

    def _send(self, status: int, kind: str, content: bytes) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        if self.path.startswith("/api/export"):
            headers["Content-Disposition"] = 'attachment; filename="report.html"'
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Nothing: the console is the user's."""


class Server(ThreadingHTTPServer):
    """The page over some runs, on the loopback interface."""

    daemon_threads = True

    def __init__(self, logs: Logs, port: int):
        """port: 0 takes a free one. Raises OSError."""
        self.logs = logs
        super().__init__((ADDRESS, port), Handler)

    @cached_property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error; everything else is shown."""
        import sys

        if not isinstance(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(logs: Logs, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises UserError where the port cannot be had."""
    try:
        server = Server(logs, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"port: {port} cannot be used ({error}). Choose another --port, or 0 for a free one.") from None
    threading.Thread(target=logs.refresh, daemon=True).start()
    say(f"{len(logs.runs)} runs at {server.url} (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        warn("")
    finally:
        server.server_close()
