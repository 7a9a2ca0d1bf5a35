"""A hub on this machine that accepts one repository: it records what it is sent, and answers as hubs do."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_thisIsNotToBeSeenAnywhere1234"


class Hub(BaseHTTPRequestHandler):
    """Accepts what the client of the hub sends for a new repository and a commit.

    At a path with a key of `refuse` in it, its value is the status; at one with `hang` in it there is no answer.
    """

    def answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.take(b"")

    def do_POST(self) -> None:
        self.take(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def take(self, body: bytes) -> None:
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.hang is not None and server.hang in self.path:
            server.hung.set()
            server.released.wait(60)  # the client hears nothing
            return None
        for part, status in server.refuse.items():
            if part in self.path:
                return self.answer(status, {"error": f"no {TOKEN}"})
        if self.command == "GET" and not server.created:
            return self.answer(404, {"error": "Repository not found"})
        if self.path == "/api/repos/create":
            server.created = True
            return self.answer(200, {"url": f"http://{self.headers['Host']}/mia/tiny", "id": "mia/tiny"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.answer(
                200,
                {"commitUrl": f"http://{self.headers['Host']}/mia/tiny/commit/1", "commitOid": "1", "success": True},
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        return self.answer(200, {"sha": "1", "id": "mia/tiny", "siblings": [], "tags": []})

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextmanager
def accepting_hub() -> Iterator[ThreadingHTTPServer]:
    """Its `seen` holds (path, authorization, body) of every request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.seen, server.refuse, server.created = [], {}, False
    server.hang, server.hung, server.released = None, threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def commits(server) -> list[dict[str, bytes]]:
    """The files of each commit."""
    found = []
    for body in [body for path, _, body in server.seen if "/commit/" in path]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        found.append({file["path"]: base64.b64decode(file["content"]) for file in files})
    return found


def sent(server) -> dict[str, bytes]:
    """The files of the one commit."""
    [files] = commits(server)
    return files
