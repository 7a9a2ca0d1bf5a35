"""How the trainer sends its weights to rollout servers: as a stream over HTTP, or as broadcasts.

Each server checks the checksum of every tensor that arrives, in each of its processes. The store of torch.distributed
is where the members of a broadcast's group meet.
"""

import http.client
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.errors import warn
from grpo.rollout.vllm.broadcast import JOIN_S, MEMBERS, READY, BrokeOff, Group, Place
from grpo.rollout.vllm.client import CONNECTION_ERRORS, Client, ServerProblem, Unusable, why
from grpo.rollout.vllm.shared_buffer import SharedBuffer
from grpo.rollout.vllm.wire import frames

POLL_S = 0.005
GRACE_S, END_S = 1.0, 10.0
FOREVER_S = 7 * 86400.0  # of a request that lasts as long as the broadcasts: those have limits of their own
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
        """other_devices: the servers have machines or GPUs of their own, and share no memory with this process."""
        self.clients, self.device, self.other_devices, self.timeout_s = list(clients), device, other_devices, timeout_s
        self.join_s = min(JOIN_S, timeout_s)
        self.group: Group | None = None
        self.buffer: SharedBuffer | None = None
        self.ipc = True  # CUDA's, of memory
        self.processes: list[int] = []  # of each server
        self.sent = 0

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> list[Outcome]:
        """What each server answered, or its problem. The tensors are always all read."""
        left = iter(tensors)
        outcomes = self._join() if self.group is None else []
        if self.group is not None:
            self.sent += 1
            body = {"group": self.group.name, "number": self.sent, "version": version}
            answers = self._ask("/broadcast", body, FOREVER_S)
            problem = "it did not begin to receive the weights"
            if self._came(self.group.store, f"{READY} {self.sent}", answers, Future.done):
                self.group.gave_up = lambda: any(_failed(answer) for answer in answers)
                try:
                    self.group.send(left)
                    _, missing = wait(answers, self.timeout_s)
                    problem = f"no answer for {self.timeout_s:g} s after the last weight" if missing else ""
                except BrokeOff as error:
                    problem = f"the broadcast of weights broke off ({error})"
            outcomes = self._outcomes(answers, problem)
        for _ in left:  # where weights are sharded, gathering them needs every rank
            pass
        return outcomes

    def _join(self) -> list[Outcome]:
        """Make the group of this process and all of the servers'; problems, where it is not made."""
        hosts, cuda = [], self.device.type == "cuda"
        self.processes = []
        for client in self.clients:
            try:
                facts = self._idle(client)
                self.processes.append(int(facts["processes"]))
                cuda = cuda and facts["device"] == "cuda"
                hosts.append(client.own_address())
            except ServerProblem as refused:
                return [refused for _ in self.clients]
            except (KeyError, TypeError, ValueError) as error:
                return [Unusable(f"{client.url}: answers are malformed ({error!r}).") for _ in self.clients]
            except CONNECTION_ERRORS as error:
                return [ServerProblem(f"{client.url}: {why(error)}.") for _ in self.clients]
        # the address that servers elsewhere reach: servers on this machine reach it, too
        host = next((found for found in hosts if not ip_address(found).is_loopback), hosts[0])
        shared: tuple[SharedBuffer, list[Any]] | None = None
        try:
            shared = None if self.other_devices else self._shared(cuda)
            listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, RuntimeError) as error:
            reason = f"{client.url}: no port at {host}, or no memory to share ({why(error)})."
            return [ServerProblem(reason) for _ in self.clients]
        buffer, handle = shared or (None, None)
        port, size = listening.getsockname()[1], 1 + sum(self.processes)
        backend = "shared" if buffer else "nccl" if cuda else "gloo"
        place = Place(secrets.token_hex(8), host, port, size, backend, self.timeout_s + JOIN_S, handle)
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.join_s),
            master_listen_fd=listening.detach(),
        )
        answers = self._ask("/group", asdict(place), FOREVER_S)
        problem = f"it did not enter the process group at port {port} of {host}"
        if self._came(store, MEMBERS, answers, _failed):
            try:
                self.group = Group(place, store, 0, host, self.device, buffer)
                _, missing = wait(answers, self.join_s)
                problem = problem if missing else ""
            except BrokeOff as error:
                problem = f"the process group at port {port} of {host} could not be made ({error})"
        del store  # so that no server waits there, where it was not made
        outcomes = self._outcomes(answers, problem)
        if buffer is not None and buffer.tensor.is_cuda and "process group:" in str(outcomes[0]):  # a server's answer
            self._without_ipc(str(outcomes[0]))
        return outcomes

    def _shared(self, cuda: bool) -> tuple[SharedBuffer, list[Any]]:
        """Memory for all groups, and its handle for one. Raises OSError, RuntimeError."""
        if cuda and self.ipc:
            try:
                self.buffer = self.buffer or SharedBuffer.create(self.device)
                return self.buffer, self.buffer.handle()
            except RuntimeError as error:
                self._without_ipc(why(error))
        self.buffer = self.buffer or SharedBuffer.create(torch.device("cpu"))
        return self.buffer, self.buffer.handle()

    def _without_ipc(self, reason: str) -> None:
        """From now on CPU memory is shared, which is slower and always works."""
        self.ipc, self.buffer = False, None
        warn(f"warning: weights go through CPU memory, because CUDA IPC fails here: {reason[:300]}")

    def _idle(self, client: Client) -> dict[str, Any]:
        """A server's facts, once it has ended an earlier try. Raises as `Client.facts`."""
        until = time.monotonic() + self.join_s
        while (facts := client.facts()).get("loading") and time.monotonic() < until:
            time.sleep(0.2)
        return facts

    def _ask(self, path: str, body: dict[str, Any], within_s: float) -> "list[Future[Outcome]]":
        """Ask every server, in threads: they answer when the broadcasts are over."""

        def ask(client: Client, answer: "Future[Outcome]") -> None:
            try:
                answer.set_result(client.ask("POST", path, body, within_s))
            except ServerProblem as problem:
                answer.set_result(problem)
            except CONNECTION_ERRORS as error:
                answer.set_result(ServerProblem(f"{client.url}: {why(error)}."))

        answers = [Future[Outcome]() for _ in self.clients]
        for each in zip(self.clients, answers, strict=True):
            threading.Thread(target=ask, args=each, name="rollout server", daemon=True).start()
        return answers

    def _came(
        self,
        store: dist.Store,
        counter: str,
        answers: "list[Future[Outcome]]",
        gave_up: Callable[["Future[Outcome]"], bool],
    ) -> bool:
        """Wait until the processes of all servers are counted, but of those that gave up: whether none did."""
        until = time.monotonic() + self.join_s
        while True:
            ended = [gave_up(answer) for answer in answers]
            missing = sum(number for number, done in zip(self.processes, ended, strict=True) if not done)
            here = store.add(counter, 0) >= missing
            if here or time.monotonic() > until:
                return here and not any(ended)
            time.sleep(POLL_S)

    def _outcomes(self, answers: "list[Future[Outcome]]", problem: str) -> list[Outcome]:
        """What the servers answered. problem: what ended the work before they did, if anything.

        Where a server failed, all have: the group is left, so that none waits in it. The first failure is the reason.
        """
        if problem:
            wait(answers, GRACE_S, FIRST_COMPLETED)  # a server that fails breaks off the broadcasts, and then answers
        failures = [answer.result() for answer in answers if _failed(answer)]
        if not problem and not failures:
            return [answer.result() for answer in answers]
        ended = [client for client, answer in zip(self.clients, answers, strict=True) if answer.done()]
        self._leave()
        _, silent = wait(answers, END_S)
        if not failures:
            lasting = [client for client, answer in zip(self.clients, answers, strict=True) if answer in silent]
            failures = [ServerProblem(f"{(ended or lasting or self.clients)[0].url}: {problem}.")]
        return failures[:1] * len(answers)

    def _leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()


def _failed(answer: "Future[Outcome]") -> bool:
    """Whether a server has answered with a problem."""
    return answer.done() and isinstance(answer.result(), ServerProblem)
