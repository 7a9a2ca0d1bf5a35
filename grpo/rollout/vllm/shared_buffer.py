"""A piece of memory through which tensors pass from a trainer to the processes of its own server on this machine.

On a GPU it is memory of that GPU, which other processes open by its CUDA IPC handle; otherwise memory without a name
in any folder, opened as /proc/PID/fd/N. The sender writes a part, every reader copies it out, and so on; counters in a
store of torch.distributed say whose turn it is. A member that leaves adds LEFT to its own counter.
"""

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

BUFFER_BYTES = 1 << 25
LEFT = 1 << 50
WRITTEN, READ = "written", "read"  # counters in the store: parts
POLL_S = 0.0005


class SharedBuffer:
    """The memory: `tensor`, uint8 [BUFFER_BYTES]."""

    def __init__(self, tensor: Tensor, file: IO[bytes] | None = None):
        """Use `create` or `open`."""
        self.tensor, self.file = tensor, file

    @classmethod
    def create(cls, device: torch.device) -> "SharedBuffer":
        """New memory. Raises RuntimeError, OSError."""
        if device.type == "cuda":
            return cls(torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device))
        if not hasattr(os, "memfd_create"):
            raise RuntimeError("this system has no shared memory of that kind: use rollout_transfer http")
        file = os.fdopen(os.memfd_create("grpo weights"), "r+b")
        file.truncate(BUFFER_BYTES)
        return cls(_mapped(file), file)

    def handle(self) -> list[Any]:
        """What `open` takes; it can be written as JSON. Raises RuntimeError."""
        if self.file is not None:
            return [f"/proc/{os.getpid()}/fd/{self.file.fileno()}"]
        _, *described = self.tensor.untyped_storage()._share_cuda_()  # the first is this process's number of the GPU
        return [one.hex() if isinstance(one, bytes) else one for one in described]

    @classmethod
    def open(cls, handle: list[Any], device: torch.device) -> "SharedBuffer":
        """Memory of another process. device: where it is, as this process knows it. Raises RuntimeError, OSError."""
        if len(handle) == 1:
            with open(handle[0], "r+b") as file:
                return cls(_mapped(file))
        if device.type != "cuda":
            raise RuntimeError(f"the trainer's memory is on a GPU, this process computes on {device}")
        described = [bytes.fromhex(one) if isinstance(one, str) else one for one in handle]
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        storage = torch.UntypedStorage._new_shared_cuda(index, *described)
        return cls(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))


def _mapped(file: IO[bytes]) -> Tensor:
    return torch.frombuffer(mmap.mmap(file.fileno(), BUFFER_BYTES), dtype=torch.uint8)


class SharedLine:
    """One member's end of a stream of bytes from the member that writes to all others, a buffer full at a time."""

    def __init__(self, buffer: SharedBuffer, store: dist.Store, readers: int, writes: bool, timeout_s: float):
        self.buffer, self.store, self.readers, self.timeout_s = buffer, store, readers, timeout_s
        self.own, self.others = (WRITTEN, READ) if writes else (READ, WRITTEN)
        self.parts = 0  # that this member has finished
        self.place: int | None = None  # in the part that it is at; None: it waits for its turn

    def move(self, data: Tensor, gave_up: Callable[[], bool] = lambda: False) -> None:
        """Send or fill `data`, uint8 [n], on the buffer's device. Raises RuntimeError when another member has left.

        gave_up: asked while this waits.
        """
        while len(data):
            if self.place is None:
                self._wait(self.parts * self.readers if self.own == WRITTEN else self.parts + 1, gave_up)
                self.place = 0
            shared = self.buffer.tensor[self.place : self.place + len(data)]
            piece, data = data[: len(shared)], data[len(shared) :]
            if self.own == WRITTEN:
                shared.copy_(piece)
            else:
                piece.copy_(shared)
            self.place += len(shared)
            if self.place == BUFFER_BYTES:
                self.end_part()

    def end_part(self) -> None:
        """The others' turn. Both sides call it at the end of a transfer. Raises RuntimeError."""
        if self.place is None:
            return
        if self.buffer.tensor.is_cuda:
            torch.cuda.current_stream(self.buffer.tensor.device).synchronize()
        self.parts, self.place = self.parts + 1, None
        self.store.add(self.own, 1)

    def _wait(self, parts: int, gave_up: Callable[[], bool]) -> None:
        """Until the others have written or read so many parts."""
        until = time.monotonic() + self.timeout_s
        while (count := self.store.add(self.others, 0)) < parts:
            if gave_up():
                raise RuntimeError("another member has failed")
            if time.monotonic() > until:
                raise RuntimeError(f"no other member took its turn for {self.timeout_s:g} s")
            time.sleep(POLL_S)
        if count >= LEFT:
            raise RuntimeError("another member has left")

    def abort(self) -> None:
        """Leave: members that wait end with an error."""
        with suppress(RuntimeError):  # the store may have gone, and with it the trainer
            self.store.set_timeout(timedelta(seconds=1))
            self.store.add(self.own, LEFT)
