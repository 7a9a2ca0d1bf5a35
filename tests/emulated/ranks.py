"""Jobs of tests/support/rank_jobs.py on several ranks, each with an emulated device of its own.

Gloo does not support this device, so that a sum is computed on the CPU and copied back. As with NCCL, the result exists
after `wait`; before, the tensor is NaN.
"""

from typing import Any

import torch
import torch.distributed as dist

from tests import emulated
from tests.emulated.start import on_device
from tests.support.rank_jobs import main

plain = dist.all_reduce


class Later:
    """The handle of a sum that is not finished."""

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, work: Any):
        self.tensor, self.host, self.work = tensor, host, work

    def wait(self) -> bool:
        """Wait for the sum, and copy it into the tensor."""
        self.work.wait()
        self.tensor.copy_(self.host)
        return True


def all_reduce(tensor: torch.Tensor, *args: Any, async_op: bool = False, **how: Any) -> Any:
    """torch's all_reduce, for tensors of the emulated device too."""
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
