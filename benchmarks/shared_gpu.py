"""train.py, several processes on one GPU: gloo takes the place of NCCL, which refuses two processes of one GPU.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m benchmarks.shared_gpu [--key value ...]

For benchmarks/gpu_check.py. A run of its own has a GPU for each process, and train.py refuses anything else.
"""

import sys
from typing import Any

import torch.distributed as dist

import train
from grpo.config.command_line import load_config
from grpo.run.main import run_main
from grpo.runtime import devices, distributed


def share_gpu() -> None:
    """All processes take the first GPU, and gloo."""
    plain = dist.init_process_group

    def join(backend: str, **how: Any) -> None:
        plain("gloo", **how)

    distributed.pick_device = lambda name, local_rank: devices.pick_device(name, 0)
    dist.init_process_group = join


if __name__ == "__main__":
    share_gpu()
    sys.exit(run_main(train.train, load_config, sys.argv[1:]))
