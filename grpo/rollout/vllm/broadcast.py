"""Weights as broadcasts: the trainer is rank 0 of a process group, the processes of its servers are the other ranks.

A server of the trainer's own gets them through memory that both share (shared_buffer.py). Otherwise the group is
NCCL's between GPUs, or gloo's: classes of torch.distributed, beside its default group, because vLLM's processes have
one of their own. The members meet at a TCP store that the trainer opens, at the address by which it reaches its first
server. Two broadcasts a tensor, and one at the end:

    header (HEADER_BYTES; JSON, padded with spaces): name, dtype, shape, checksum | the tensor's bytes
    header: count
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.rollout.vllm.shared_buffer import SharedBuffer, SharedLine
from grpo.rollout.vllm.wire import BadStream, frame_of, header_of, parse_header
from grpo.runtime.checksums import checksum

HEADER_BYTES = 2048
JOIN_S = 60.0  # most seconds for all members to meet
STORE_S = 20.0  # the same for a server's process to reach the store: it fails, and says so, before the others give up
MEMBERS, READY = "members", "ready"  # counters in the store


class BrokeOff(Exception):
    """A broadcast failed: another member has died, or is silent."""


@dataclass(frozen=True)
class Place:
    """Where a group meets, as the trainer tells its servers."""

    name: str
    host: str
    port: int
    size: int
    backend: str  # nccl, gloo or shared
    timeout_s: float  # of a broadcast
    buffer: list[Any] | None = None  # the handle of the memory, where it is shared


class Group:
    """One member of a group."""

    def __init__(
        self,
        place: Place,
        store: dist.Store,
        rank: int,
        own_host: str,
        device: torch.device,
        buffer: SharedBuffer | None = None,
    ):
        """device: where tensors are sent from or arrive. gloo waits here for all members. Raises BrokeOff."""
        self.store, self.name = store, place.name
        self.device = device if place.backend == "nccl" else torch.device("cpu")
        self.gave_up: Callable[[], bool] = lambda: False  # whether another member is known to have failed
        timeout = timedelta(seconds=place.timeout_s)
        try:
            if buffer is not None:
                self.device = buffer.tensor.device
                self.group: Any = SharedLine(buffer, store, place.size - 1, rank == 0, place.timeout_s)
            elif place.backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                with _blocking_wait():
                    self.group = dist.ProcessGroupNCCL(store, rank, place.size, options)
            else:
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._timeout = timeout
                options._devices = [gloo.create_device(hostname=own_host)]
                self.group = gloo(store, rank, place.size, options)
        except RuntimeError as error:
            raise BrokeOff(_first_words(error)) from None

    @classmethod
    def join(cls, place: Place, device: torch.device) -> "Group":
        """A server's process joins. Raises BrokeOff."""
        try:
            store = dist.TCPStore(
                place.host, place.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_S)
            )
            buffer = None if place.buffer is None else SharedBuffer.open(place.buffer, device)
            rank = store.add(MEMBERS, 1)
            with socket.socket(socket.AF_INET6 if ":" in place.host else socket.AF_INET, socket.SOCK_DGRAM) as probing:
                probing.connect((place.host, place.port))  # sends nothing, and tells which address would
                own_host = probing.getsockname()[0]
        except (RuntimeError, OSError) as error:
            raise BrokeOff(f"the trainer at port {place.port} of {place.host}: {_first_words(error)}") from None
        return cls(place, store, rank, own_host, device, buffer)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast tensors, one after another. Raises BrokeOff."""
        count = 0
        for name, tensor in tensors:
            flat = tensor.detach().to(self.device).contiguous().view(-1)
            self._broadcast(self._padded(header_of(name, tensor.shape, flat)))
            if flat.numel():
                self._broadcast(flat.view(torch.uint8))
            count += 1
            del flat, tensor  # before the next one is made
        self._broadcast(self._padded({"count": count}))
        self._end()

    def receive(self, number: int, changed: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of transfer `number`. changed: gets the names of those that were changed on the way.

        Raises BrokeOff, and BadStream for a malformed header.
        """
        try:
            self.store.add(f"{READY} {number}", 1)
        except RuntimeError as error:
            raise BrokeOff(_first_words(error)) from None
        count = 0
        while True:
            padded = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self.device)
            self._broadcast(padded)
            header = parse_header(padded.cpu().numpy().tobytes(), f"of tensor {count}")
            if "count" in header:
                if header["count"] != count:
                    raise BadStream(f"{count} tensors, where {header['count']} were announced")
                return self._end()
            frame = frame_of(header, count)
            flat = torch.empty(frame.length, dtype=torch.uint8, device=self.device)
            if frame.length:
                self._broadcast(flat)
            tensor = flat.view(frame.dtype).view(frame.shape)
            if int(checksum(tensor)) != frame.checksum:
                changed.append(frame.name)
            yield frame.name, tensor
            count += 1
            del flat, tensor

    def close(self) -> None:
        """Leave: members that wait for a broadcast end with an error."""
        group, self.group = self.group, None
        if group is not None:
            group.abort()

    def _padded(self, header: dict[str, Any]) -> Tensor:
        text = json.dumps(header).encode().ljust(HEADER_BYTES)
        assert len(text) == HEADER_BYTES, f"a tensor's name or shape is too long: {text[:100]!r}"
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)

    def _broadcast(self, tensor: Tensor) -> None:
        if self.group is None:
            raise BrokeOff("this process has left")
        try:
            if isinstance(self.group, SharedLine):
                self.group.move(tensor, self.gave_up)
            else:
                self.group.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise BrokeOff(_first_words(error)) from None

    def _end(self) -> None:
        if isinstance(self.group, SharedLine):
            try:
                self.group.end_part()
            except RuntimeError as error:
                raise BrokeOff(_first_words(error)) from None


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """NCCL groups that are made here wait in `wait`, and raise there; by default a peer's death ends the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
