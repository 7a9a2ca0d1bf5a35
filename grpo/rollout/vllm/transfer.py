"""How the trainer sends its weights to rollout servers: as a stream over HTTP, or as broadcasts.

Each server checks the checksum of every tensor that arrives, in each of its processes.
"""

import http.client
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.rollout.vllm.broadcast import JOIN_S, MEMBERS, READY, BrokeOff, Group, Place
from grpo.rollout.vllm.client import CONNECTION_ERRORS, Client, ServerProblem, why
from grpo.rollout.vllm.wire import frames

POLL_S = 0.005
GRACE_S, END_S = 1.0, 10.0
Outcome = dict[str, Any] | ServerProblem


def send_by_http(
    clients: Sequence[Client], tensors: Iterable[tuple[str, Tensor]], version: str, load_s: float
) -> list[dict[str, Any] | ServerProblem]:
    """Send one stream of tensors to every server; what each answered, or its problem. The tensors are always all read.

    load_s: seconds that a server may take to load what it got.
    """
    connections: list[http.client.HTTPConnection | None] = []
    outcomes: list[dict[str, Any] | ServerProblem] = [ServerProblem(client.url) for client in clients]
    for i, client in enumerate(clients):
        connection = client.kind(client.address, timeout=load_s)
        try:
            connection.putrequest("POST", f"/weights?version={quote(version)}")
            for name, value in client.headers.items():
                connection.putheader(name, value)
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            connections.append(connection)
        except CONNECTION_ERRORS as error:
            outcomes[i] = ServerProblem(f"{client.url}: {why(error)}.")
            connections.append(None)

    def send(*parts: bytes | memoryview) -> None:
        for i, connection in enumerate(connections):
            try:
                for part in parts if connection is not None else ():
                    connection.send(part)  # type: ignore[union-attr]
            except OSError as error:
                outcomes[i] = _why_it_broke_off(clients[i], connection, error)
                connections[i] = None

    for piece in frames(tensors):
        send(b"%x\r\n" % len(piece), piece, b"\r\n") if len(piece) else None
    send(b"0\r\n\r\n")
    for i, (client, open_connection) in enumerate(zip(clients, connections, strict=True)):
        try:
            if open_connection is not None:
                outcomes[i] = client.answer(open_connection.getresponse())
        except ServerProblem as problem:
            outcomes[i] = problem
        except CONNECTION_ERRORS as error:
            outcomes[i] = _why_it_broke_off(client, None, error)
    return outcomes


def _why_it_broke_off(
    client: Client, connection: http.client.HTTPConnection | None, error: BaseException
) -> ServerProblem:
    """A server may answer, and close, before it has read everything."""
    try:
        if connection is not None:
            client.answer(connection.getresponse())
    except ServerProblem as problem:
        return problem
    except CONNECTION_ERRORS:
        pass
    return ServerProblem(f"{client.url}: the transfer of weights broke off ({why(error)}).")


class Broadcaster:
    """Broadcasts weights to all servers at once. The group is made at the first transfer, and after a failed one."""

    def __init__(self, clients: Sequence[Client], device: torch.device, other_devices: bool, timeout_s: float):
        """other_devices: the servers' GPUs are not this process's: NCCL needs one for each of its ranks."""
        self.clients, self.device, self.other_devices, self.timeout_s = list(clients), device, other_devices, timeout_s
        self.group: Group | None = None
        self.processes: list[int] = []  # of each server
        self.sent = 0

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> list[Outcome]:
        """What each server answered, or its problem. The tensors are always all read."""
        left = iter(tensors)
        outcomes = self._join() if self.group is None else []
        if self.group is not None:
            self.sent += 1
            body = {"group": self.group.name, "number": self.sent, "version": version}
            answers = self._ask("/broadcast", body, self.timeout_s)
            broken = "not every server began to receive it"
            if self._came(self.group.store, f"{READY} {self.sent}", answers):
                try:
                    self.group.send(left)
                    broken = ""
                except BrokeOff as error:
                    broken = str(error)
            outcomes = self._outcomes(answers, f"the broadcast of weights broke off ({broken})" if broken else "")
        for _ in left:  # where weights are sharded, gathering them needs every rank
            pass
        return outcomes

    def _join(self) -> list[Outcome]:
        """Make the group of this process and all of the servers'; problems, where it is not made."""
        try:
            facts = [client.facts() for client in self.clients]
            self.processes = [int(each["processes"]) for each in facts]
            cuda = self.device.type == "cuda" and all(each["device"] == "cuda" for each in facts)
            host = self.clients[0].own_address()
            listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (ServerProblem, KeyError, TypeError, ValueError, *CONNECTION_ERRORS) as error:
            line = str(error) if isinstance(error, ServerProblem) else why(error)
            return [ServerProblem(line if client.url in line else f"{client.url}: {line}") for client in self.clients]
        port = listening.getsockname()[1]
        backend = "nccl" if cuda and self.other_devices else "gloo"
        place = Place(secrets.token_hex(8), host, port, 1 + sum(self.processes), backend, self.timeout_s)
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_S),
            master_listen_fd=listening.detach(),
        )
        answers = self._ask("/group", asdict(place), JOIN_S)
        problem = "not every process of the servers entered the process group"
        if self._came(store, MEMBERS, answers):
            try:
                self.group, problem = Group(place, store, 0, host, self.device), ""
            except BrokeOff as error:
                problem = f"the process group could not be made ({error})"
        del store  # so that no server waits there, where it was not made
        return self._outcomes(answers, problem)

    def _ask(self, path: str, body: dict[str, Any], within_s: float) -> list[Future[Outcome]]:
        """Ask every server, in threads: they answer when the broadcasts are over."""

        def ask(client: Client) -> Outcome:
            try:
                return client.ask("POST", path, body, within_s)
            except ServerProblem as problem:
                return problem
            except CONNECTION_ERRORS as error:
                return ServerProblem(f"{client.url}: {why(error)}.")

        asking = ThreadPoolExecutor(len(self.clients), "rollout server")
        answers = [asking.submit(ask, client) for client in self.clients]
        asking.shutdown(wait=False)
        return answers

    def _came(self, store: dist.Store, counter: str, answers: list[Future[Outcome]]) -> bool:
        """Wait until the processes of all servers are counted, but of those that gave up: whether none did."""
        until = time.monotonic() + JOIN_S
        while True:
            ended = [answer.done() for answer in answers]
            missing = sum(number for number, done in zip(self.processes, ended, strict=True) if not done)
            if store.add(counter, 0) >= missing or time.monotonic() > until:
                return not any(ended) and store.add(counter, 0) >= missing
            time.sleep(POLL_S)

    def _outcomes(self, answers: list[Future[Outcome]], problem: str) -> list[Outcome]:
        """What the servers answered. problem: what ended the work before they did, if anything.

        Where a server failed, all have: the group is left, so that none waits in it. The first failure is the reason.
        """
        if not problem:
            outcomes = [answer.result() for answer in answers]
            reason = next((outcome for outcome in outcomes if isinstance(outcome, ServerProblem)), None)
            if reason is None:
                return outcomes
            self._leave()
            return [reason for _ in answers]
        wait(answers, GRACE_S, FIRST_COMPLETED)  # a server that fails breaks off the broadcasts, and then answers
        ended = [(client, answer) for client, answer in zip(self.clients, answers, strict=True) if answer.done()]
        self._leave()
        wait(answers, END_S)  # a server that has not ended would refuse the next try
        client, _ = next(iter(ended), (self.clients[0], None))
        failures = [answer.result() for _, answer in ended if isinstance(answer.result(), ServerProblem)]
        return [*failures, ServerProblem(f"{client.url}: {problem}.")][:1] * len(answers)

    def _leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()
