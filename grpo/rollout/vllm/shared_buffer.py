"""A piece of memory through which tensors pass from a trainer to the processes of its own server on this machine.

On a GPU it is memory of that GPU, which other processes open by its CUDA IPC handle; otherwise memory without a name
in any folder, opened as /proc/PID/fd/N. The sender writes a part, every reader copies it out, and so on; counters in a
store of torch.distributed say whose turn it is. A member that leaves adds LEFT to its own counter.
"""

import mmap
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUFFER_BYTES = 1 << 25
LEFT = 1 << 50
WRITTEN, READ = "written", "read"  # counters in the store: parts
POLL_S = 0.0002
CUDA_FIELDS = 8  # of torch's description of shared CUDA memory


class SharedBuffer:
    """The memory: `tensor`, uint8 [BUFFER_BYTES]."""

    def __init__(self, tensor: Tensor, handle: list[Any], descriptor: int | None = None):
        """Use `create` or `open`."""
        self.tensor, self.handle, self.descriptor = tensor, handle, descriptor

    @classmethod
    def create(cls, device: torch.device) -> "SharedBuffer":
        """New memory. Its `handle` can be written as JSON, and is what `open` takes. Raises RuntimeError, OSError."""
        if device.type == "cuda":
            tensor = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
            _, *described = tensor.untyped_storage()._share_cuda_()  # the first is this process's number of the GPU
            return cls(tensor, [one.hex() if isinstance(one, bytes) else one for one in described])
        if not hasattr(os, "memfd_create"):
            raise RuntimeError("this system has no shared memory of that kind: use rollout_transfer http")
        descriptor = os.memfd_create("grpo weights")
        os.ftruncate(descriptor, BUFFER_BYTES)
        return cls(_mapped(descriptor), [f"/proc/{os.getpid()}/fd/{descriptor}"], descriptor)

    @classmethod
    def open(cls, handle: list[Any], device: torch.device) -> "SharedBuffer":
        """Memory of another process. device: where it is, as this process knows it. Raises RuntimeError, OSError."""
        if len(handle) == 1:
            descriptor = os.open(handle[0], os.O_RDWR)
            try:
                return cls(_mapped(descriptor), handle)
            finally:
                os.close(descriptor)
        if device.type != "cuda" or len(handle) != CUDA_FIELDS - 1:
            raise RuntimeError(f"the trainer's memory is on a GPU, this process computes on {device}")
        described = [bytes.fromhex(one) if isinstance(one, str) else one for one in handle]
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(index, *described)
        return cls(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), handle)

    def close(self) -> None:
        """Other processes keep what they have opened."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _mapped(descriptor: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, BUFFER_BYTES), dtype=torch.uint8)


class SharedLine:
    """One member's end: `broadcast` as a process group's, from the member that writes to all others."""

    def __init__(self, buffer: SharedBuffer, store: dist.Store, readers: int, writes: bool, timeout_s: float):
        self.buffer, self.store, self.readers, self.timeout_s = buffer, store, readers, timeout_s
        self.own, self.others = (WRITTEN, READ) if writes else (READ, WRITTEN)
        self.parts = 0

    def broadcast(self, data: Tensor, gave_up: Callable[[], bool] = lambda: False) -> None:
        """Send or fill `data`, uint8 [n], on the buffer's device. Raises RuntimeError when another member has left.

        gave_up: asked while this waits.
        """
        for part in data.split(BUFFER_BYTES):
            shared = self.buffer.tensor[: len(part)]
            if self.own == WRITTEN:
                self._wait(self.parts * self.readers, gave_up)
                shared.copy_(part)
            else:
                self._wait(self.parts + 1, gave_up)
                part.copy_(shared)
            if shared.is_cuda:
                torch.cuda.current_stream(shared.device).synchronize()
            self.parts += 1
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
        try:
            self.store.set_timeout(timedelta(seconds=1))
            self.store.add(self.own, LEFT)
        except RuntimeError:
            pass  # the store has gone, and with it the trainer
        self.buffer.close()
