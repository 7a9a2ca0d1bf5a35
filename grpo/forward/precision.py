"""Process-wide choices of how forward passes compute: number types, device syncs, attention kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch


def arithmetic(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass: plain fp32, or bf16 products over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bf16" else nullcontext()


def arithmetic_dtype(dtype: str) -> torch.dtype:
    """The type in which `arithmetic` computes products."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def host_reads_are_free(device: torch.device) -> bool:
    """True on CPU, where reading a scalar does not force a device sync."""
    return device.type == "cpu"


def disable_cudnn_attention() -> None:
    """Take cuDNN's kernels out of torch's choice for scaled_dot_product_attention, in this process.

    torch prefers them on the newest GPUs. With a mask they have returned wrong values without an error (pytorch issues
    193893, forward, and 196678, backward), and they plan again for every new length. The other kernels remain.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
