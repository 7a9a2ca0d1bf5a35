"""The device and the CPU threads of a process."""

import os

import torch

from grpo.errors import UserError


def pick_device(name: str, local_rank: int) -> torch.device:
    """Resolve auto | cpu | cuda to this process's device. Raises UserError when CUDA is not available."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device: got cuda, but PyTorch sees no GPU here. Use --device cpu, or auto to take what is available."
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: local rank {local_rank} has no GPU of its own, {torch.cuda.device_count()} visible: one process "
            "per GPU. Lower --nproc_per_node, widen CUDA_VISIBLE_DEVICES, or use --device cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_threads(num_threads: int | None, local_size: int) -> None:
    """Set the number of intra-op threads; by default this machine's cores divided by its ranks.

    A process that is alone takes OMP_NUM_THREADS where it is set. For several torchrun sets it to 1 by itself, so that
    it says nothing, and the arithmetic of one process would differ from that of two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": of nested regions
    if num_threads is None and local_size == 1 and wanted.isascii() and wanted.isdigit():
        num_threads = int(wanted[:6])
    torch.set_num_threads(num_threads or max(1, cores // local_size))
