"""Jobs of tests/support/rank_jobs.py on several ranks, each with an emulated device of its own.

Gloo knows no such device, so that a sum takes the way through the CPU's memory. As with NCCL it is there after `wait`
and not before: until then the tensor holds no number.
"""

from typing import Any

import torch
import torch.distributed as dist

from tests import emulated
from tests.emulated.start import on_device
from tests.support.rank_jobs import main

plain = dist.all_reduce


class Later:
    """A sum that is under way."""

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, work: Any):
        self.tensor, self.host, self.work = tensor, host, work

    def wait(self) -> bool:
        """Put it where it belongs."""
        self.work.wait()
        self.tensor.copy_(self.host)
        return True


def all_reduce(tensor: torch.Tensor, *args: Any, async_op: bool = False, **how: Any) -> Any:
    """As torch's."""
    if tensor.device.type != emulated.NAME:
        return plain(tensor, *args, async_op=async_op, **how)
    host = tensor.cpu()
    later = Later(tensor, host, plain(host, *args, async_op=True, **how))
    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    return later if async_op else (later.wait(), None)[1]


if __name__ == "__main__":
    on_device()
    dist.all_reduce = all_reduce
    main()
