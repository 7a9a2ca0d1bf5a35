"""A rollout server without vLLM: the routes and lines of grpo/rollout/vllm/server.py, and ways to go wrong.

It samples with the native engine, one request at a time, so that a completion does not depend on the others to the
last bit, and it holds the weights that it is sent in a model of its own. Faults are functions that tests hang into it.
"""

import functools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo.models.loading import prepare
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.rollout.stop_strings import StopStrings
from grpo.rollout.vllm.broadcast import BrokeOff, Group, Place
from grpo.rollout.vllm.wire import (
    PROTOCOL,
    BadStream,
    index_of,
    packed,
    packed_support,
    read_frames,
    unpacked,
    vocabulary_of,
)
from grpo.types import Completion

TOKEN = "stand-in-secret-of-32-characters"
PROGRESS_S = 0.2
Named = Iterator[tuple[str, Tensor]]


class Died(Exception):
    """Raised in a hook: the connection breaks off."""


class StandIn:
    """A server at a free port of loopback; `die` and `revive` stand for a kill and a restart."""

    def __init__(self, model: Path, folder: Path):
        self.model_folder, self.folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model: PreTrainedModel = prepare(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.version, self.port = "", 0
        self.busy = threading.Lock()  # of the model
        self.loads: list[dict[str, Tensor]] = []  # what each transfer brought
        self.asked: list[tuple[str, int]] = []  # (version, requests) of each call of /generate
        self.token = TOKEN
        self.own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.listening: _Listening | None = None
        self.group: Group | None = None
        self.connections: set[socket.socket] = set()
        self.behave()

    def behave(self) -> None:
        """No fault; with the model that it was started with."""
        self.version = ""
        self.loads.clear()
        self.asked.clear()
        self.slept = 0
        self.leave()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.own[name])
        # where tests make it go wrong
        self.change_facts: Callable[[dict[str, Any]], Any] = lambda facts: facts
        self.change_stored: Callable[[Path], None] = lambda file: None
        self.change_broadcast: Callable[[Named], Named] = lambda tensors: tensors
        self.change_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
        self.change_lines: Callable[[Iterator[bytes], dict[str, Any]], Iterator[bytes]] = lambda lines, given: lines
        self.before: Callable[[str], tuple[int, bytes] | None] = lambda path: None  # another answer than its own

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """Stop to listen, and break all connections."""
        if self.listening is None:
            return
        self.listening.shutdown()
        self.listening.server_close()
        self.listening = None
        for connection in list(self.connections):
            _reset(connection)
        self.leave()

    def leave(self) -> None:
        """Its part of a process group ends."""
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def revive(self, kept: bool = True) -> None:
        """Listen, at the same port as before. kept: with the weights that it was sent last."""
        self.die()
        if not kept:
            self.version = ""
        handler = type("OfThisServer", (_Handler,), {"server_of": self})
        self.listening = _Listening(("127.0.0.1", self.port), handler)
        self.port = self.listening.server_address[1]
        threading.Thread(target=self.listening.serve_forever, args=(0.02,), daemon=True).start()

    def facts(self) -> dict[str, Any]:
        """As server.py says them."""
        config = self.model.config
        named = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        return {
            "protocol": PROTOCOL,
            "vllm": "none",
            "model": str(self.model_folder),
            "architecture": config.architectures[0],
            "dtype": "float32",
            "max_model_len": config.max_position_embeddings,
            "version": self.version,
            "unfinished": 0,
            "loading": False,
            "device": "cpu",
            "vocabulary": vocabulary_of(self.tokenizer),
            "copies": 1,
            "processes": 1,
            **named,
        }

    def load(self, file: Path, version: str) -> dict[str, Any]:
        """Load a stored stream. Raises BadStream, or ValueError for weights that do not fit."""
        changed: list[str] = []
        return self.take(dict(read_frames(file, index_of(file), changed)), changed, version)

    def join(self, place: dict[str, Any]) -> dict[str, Any]:
        """Enter a trainer's process group. Raises BrokeOff."""
        self.group = Group.join(Place(**place), torch.device("cpu"))
        return {"group": self.group.name}

    def load_broadcast(self, given: dict[str, Any]) -> dict[str, Any]:
        """Load broadcast weights. Raises ValueError, BadStream and BrokeOff."""
        if self.group is None or self.group.name != given["group"]:
            raise ValueError("it is not in the trainer's process group")
        changed: list[str] = []
        tensors = dict(self.change_broadcast(self.group.receive(given["number"], changed)))
        return self.take(tensors, changed, given["version"])

    def take(self, tensors: dict[str, Tensor], changed: list[str], version: str) -> dict[str, Any]:
        """Use these weights. Raises BadStream, or ValueError for weights that do not fit."""
        self.version = ""
        if changed:
            raise BadStream(f"the weight {changed[0]} arrived changed")
        with self.busy:
            own = dict(self.model.named_parameters())
            loaded = self.change_weights(dict(tensors))
            unknown = [name for name, tensor in loaded.items() if name not in own or own[name].shape != tensor.shape]
            if unknown:
                raise ValueError(f"weights that do not fit: {unknown[0]}")
            with torch.no_grad():
                for name, tensor in loaded.items():
                    own[name].copy_(tensor)
            self.loads.append(tensors)
            self.version = version
        return {"version": version, "seconds": 0.0}

    @functools.cache  # noqa: B019
    def engine(self, stop_ids: tuple[int, ...], limit: int, seed: int, num_tokens: int, stop: Any) -> NativeEngine:
        """The engine of such requests."""
        strings = StopStrings.of(self.tokenizer, stop)
        return NativeEngine(self.model, stop_ids, limit, seed, num_tokens=num_tokens, stop_strings=strings)

    def lines(self, given: dict[str, Any]) -> Iterator[bytes]:
        """The answer of /generate, one completion after another."""
        sampling = Sampling(*given["sampling"])
        prompts = [tuple(unpacked(text, "<i4").tolist()) for text in given["prompts"]]
        drawn, told = 0, time.monotonic()
        for key, place, limit, seed, slot, generation, num_drawn in given["requests"]:
            engine = self.engine(tuple(given["stop_ids"]), limit, seed, given["num_tokens"], tuple(given["stop"]))
            request = Request(key, slot, generation, prompts[place], num_drawn)
            with self.busy:
                (one,) = engine.generate([request], sampling)
            drawn += len(one.token_ids)
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                yield json.dumps({"progress": drawn}).encode() + b"\n"
            yield json.dumps(line_of(key, one, given["version"])).encode() + b"\n"
        yield b'{"done": true}\n'


def line_of(key: int, one: Completion, version: str) -> dict[str, Any]:
    """A completion as server.py writes it."""
    line: dict[str, Any] = {"key": key, "finish": one.finish, "version": version}
    line |= {"tokens": packed(one.token_ids, "<i4"), "logprobs": packed(one.sampler_logprobs, "<f4")}
    return line if one.support is None else line | packed_support([ids[ids >= 0] for ids in one.support])


class _Listening(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client has left."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: StandIn

    def setup(self) -> None:
        super().setup()
        self.server_of.connections.add(self.connection)

    def finish(self) -> None:
        self.server_of.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        server, parts = self.server_of, urlsplit(self.path)
        try:
            other = server.before(parts.path)
            if other is not None:
                if parts.path == "/weights":
                    list(self.pieces())
                self.answer(*other)
            elif self.headers.get("Authorization") != f"Bearer {server.token}":
                self.answer(401, b'{"error": "the token is missing or wrong"}')
            elif parts.path == "/health":
                self.answer(200, json.dumps(server.change_facts(server.facts())).encode())
            elif parts.path == "/weights":
                self.weights(parse_qs(parts.query)["version"][0])
            elif parts.path in ("/group", "/broadcast"):
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer_of(lambda: server.join(given) if parts.path == "/group" else server.load_broadcast(given))
            elif parts.path == "/generate":
                self.generate()
            elif parts.path == "/sleep":
                server.slept += 1
                self.answer(200, b'{"asleep": true}')
            else:
                self.answer(404, b'{"detail": "Not Found"}')
        except (Died, OSError):
            _reset(self.connection)
            self.close_connection = True

    def pieces(self) -> Iterator[bytes]:
        """The chunks of the body."""
        while size := int(self.rfile.readline() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def weights(self, version: str) -> None:
        server = self.server_of
        file = server.folder / f"arriving_{server.port}"
        with file.open("wb") as stored:
            for piece in self.pieces():
                stored.write(piece)
        server.change_stored(file)
        self.answer_of(lambda: server.load(file, version))

    def answer_of(self, work: Callable[[], dict[str, Any]]) -> None:
        """As routes.py answers for work that changes the weights."""
        try:
            self.answer(200, json.dumps(work()).encode())
        except BadStream as error:
            self.answer(400, json.dumps({"error": f"weights: {error}"}).encode())
        except (ValueError, BrokeOff) as error:
            self.answer(500, json.dumps({"error": f"weights: {error}"}).encode())

    def generate(self) -> None:
        server = self.server_of
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if given["version"] != server.version:
            text = f"it holds weights {server.version or 'of none'}, asked for {given['version']}"
            self.answer(409, json.dumps({"error": text}).encode())
            return
        server.asked.append((given["version"], len(given["requests"])))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in server.change_lines(server.lines(given), given):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")


def _reset(connection: socket.socket) -> None:
    """Close it as the kernel closes those of a killed process that left data unread."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
