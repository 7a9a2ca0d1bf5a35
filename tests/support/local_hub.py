"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that loading models and data uses.

Real clients use it (HF_ENDPOINT), in processes with a cache of their own, so that no request leaves the machine.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([\w.-]+)(/.*)?)?")
FILE = re.compile(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")


def commit_of_branch(branch: str) -> str:
    """The commit at its head."""
    return hashlib.sha1(branch.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """One request. `server.folders`: (models or datasets, name) -> its folder; a name may be gated instead.

    A name with @revision is another branch of it, with a commit of its own.
    """

    protocol_version = "HTTP/1.1"
    server: "_Server"
    commit = COMMIT

    def log_message(self, format: str, *args: object) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", body)
        self._answer({unquote(path) for path in paths})

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, paths: set[str] | None) -> None:
        url = unquote(urlsplit(self.path).path)
        if match := API.fullmatch(url):
            kind, name, what = match[1], match[2], match[3]
            folder = self._folder(kind, name, match[4])
            if folder is not None and what in ("tree", "paths-info"):
                under = (match[5] or "/").strip("/")
                self._send(200, json.dumps(_entries(folder, under, paths)).encode())
            elif folder is not None:
                files = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
                about = {
                    "_id": "1",
                    "id": name,
                    "sha": self.commit,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": files,
                }
                self._send(200, json.dumps(about).encode())
        elif match := FILE.fullmatch(url):
            folder = self._folder(match[1] or "models", match[2], match[3])
            if folder is not None:
                self._file(folder, match[4])
        else:
            self._refuse("RepoNotFound", "Repository not found")

    def _folder(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The repository's folder at a revision, or None after sending the hub's refusal. Sets its commit."""
        if name in self.server.gated:
            self._refuse("GatedRepo", "Access to it is restricted.")
            return None
        folder = self.server.folders.get((kind, name))
        if folder is None:  # without a login the hub sends the same for private repositories
            self._refuse("RepoNotFound", "Repository not found")
            return None
        self.commit = COMMIT
        if revision in (None, "main", COMMIT):
            return folder
        for (other_kind, other), there in self.server.folders.items():
            branch = other.partition("@")[2]
            if other_kind == kind and other == f"{name}@{branch}" and revision in (branch, commit_of_branch(branch)):
                self.commit = commit_of_branch(branch)
                return there
        self._refuse("RevisionNotFound", "Invalid rev id", 404)
        return None

    def _refuse(self, code: str, message: str, status: int = 401) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if path not in _files(folder):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = path.read_bytes()
        self._send(200, content, {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folders: dict[tuple[str, str], Path], gated: set[str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders, self.gated = folders, gated
        self.asked: list[str] = []


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries(folder: Path, under: str, paths: set[str] | None) -> list[dict]:
    """Files and folders as the hub lists them; paths: only these."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (paths is not None and name not in paths) or (under and not name.startswith(under + "/")):
            continue
        if path.is_dir():
            found.append({"type": "directory", "oid": _oid(name.encode()), "size": 0, "path": name})
        else:
            content = path.read_bytes()
            found.append({"type": "file", "oid": _oid(content), "size": len(content), "path": name})
    return found


@contextmanager
def local_hub(folders: dict[tuple[str, str], Path], gated: set[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """A hub of these folders: (its address, the requests that it got)."""
    server = _Server(folders, set(gated))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    finally:
        server.shutdown()
        server.server_close()
