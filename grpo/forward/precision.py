"""What forward passes compute in: plain fp32, or bf16 products over fp32 weights."""

from contextlib import AbstractContextManager, nullcontext

import torch


def arithmetic(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass: plain fp32, or bf16 products over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bf16" else nullcontext()


def arithmetic_dtype(dtype: str) -> torch.dtype:
    """What `arithmetic` computes products in."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def host_reads_are_free(device: torch.device) -> bool:
    """Whether to ask for a number costs nothing. A GPU would first finish all work before it: there nobody asks."""
    return device.type == "cpu"
