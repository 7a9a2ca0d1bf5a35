"""torch's fused attention kernels behind one pair of functions: result with log-sum-exp, and gradients from both.

    CPU                  flash attention
    CUDA, bf16 and fp16  flash attention with cumulative lengths: a part is one call
    CUDA, fp32           memory-efficient attention with cumulative lengths; repeats the keys of grouped heads

Their backward takes the result and the log-sum-exp as arguments, so that both may be those of several parts merged
(fused_attention.py, which also checks each kernel before its first use).

Shapes: query [1, H, n, d], key and value [1, kvh, m, d], result [1, H, n, d], log-sum-exp [1, H, n] fp32.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from grpo.forward.attention_parts import Part, Rows

ATEN = torch.ops.aten
NO_MASK, CAUSAL = 0, 1  # mask types of memory-efficient attention

Gradients = tuple[Tensor, Tensor, Tensor]


class Saved(NamedTuple):
    """What a backward takes; the result and the log-sum-exp may be those of several parts merged."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    others: tuple[Tensor, ...]  # a kernel's own, from its forward


class Kernel(Protocol):
    """A fused kernel."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Result, log-sum-exp, and `Saved.others`."""

    def backward(self, gradient: Tensor, saved: Saved, part: Part, scale: float) -> Gradients:
        """Gradients of query, key and value."""


class CpuFlash:
    """Flash attention on CPU: a call for each long segment, padded rows for short ones."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> Any:
        """See Kernel. A query that no call has: result 0, log-sum-exp -inf."""
        _, heads, length, width = query.shape
        out = query.new_zeros(1, length, heads, width).transpose(1, 2)  # as the model reads it: heads side by side
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_full((1, heads, length), -torch.inf, dtype=lse_dtype)
        flash = ATEN._scaled_dot_product_flash_attention_for_cpu
        for call in part.calls:
            if isinstance(call, Rows):
                rows = (_gather(tensor, call) for tensor in (query, key, value))
                row_out, row_lse = flash(*rows, 0.0, True, scale=scale)
                _scatter(out, row_out, call)
                _scatter(lse, row_lse, call)
            else:
                queries, keys, mask = call.queries, call.keys, call.mask(query.dtype)
                inputs = (query[:, :, queries], key[:, :, keys], value[:, :, keys])
                found = flash(*inputs, 0.0, call.causal, attn_mask=mask, scale=scale)
                out[:, :, queries], lse[:, :, queries] = found
        return out, lse, ()

    def backward(self, gradient: Tensor, saved: Saved, part: Part, scale: float) -> Gradients:
        """See Kernel."""
        query, key, value, out, lse, _ = saved
        grads = (torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
        flash = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
        for call in part.calls:
            if isinstance(call, Rows):
                row_grad, *inputs, row_lse = (_gather(x, call) for x in (gradient, query, key, value, out, lse))
                row_lse.masked_fill_(call.padding[:, None], torch.inf)  # probability 0, whatever stands there
                for grad, row in zip(grads, flash(row_grad, *inputs, row_lse, 0.0, True, scale=scale), strict=True):
                    _scatter(grad, row, call)
            else:
                queries, keys, mask = call.queries, call.keys, call.mask(query.dtype)
                own_gradient, own_query, own_out, own_lse = (x[:, :, queries] for x in (gradient, query, out, lse))
                inputs = [own_query, key[:, :, keys], value[:, :, keys], own_out, own_lse]
                found = flash(own_gradient, *inputs, 0.0, call.causal, attn_mask=mask, scale=scale)
                for grad, own, where in zip(grads, found, (queries, keys, keys), strict=True):
                    grad[:, :, where] += own
        return grads


def _gather(tensor: Tensor, rows: Rows) -> Tensor:
    """[1, H, n, ...] -> [b, H, c, ...]."""
    return tensor[0].index_select(1, rows.source).unflatten(1, rows.padding.shape).transpose(0, 1)


def _scatter(tensor: Tensor, padded: Tensor, rows: Rows) -> None:
    """Write [b, H, c, ...] to its places in [1, H, n, ...]."""
    tensor[0].index_copy_(1, rows.tokens, padded.transpose(0, 1).flatten(1, 2).index_select(1, rows.places))


class CudaFlash:
    """Flash attention on CUDA, bf16 and fp16: all segments of a part in one call."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> Any:
        """See Kernel."""
        inputs = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [n, H, d]
        out, lse, *others = ATEN._flash_attention_forward(
            *inputs, *self._lengths(part), 0.0, part.causal, False, scale=scale
        )
        return out.transpose(0, 1)[None], lse[None], tuple(others[:2])

    def backward(self, gradient: Tensor, saved: Saved, part: Part, scale: float) -> Gradients:
        """See Kernel."""
        *tensors, lse, others = saved
        inputs = (tensor[0].transpose(0, 1) for tensor in (gradient, *tensors))
        grads = ATEN._flash_attention_backward(
            *inputs, lse[0].contiguous(), *self._lengths(part), 0.0, part.causal, *others, scale=scale
        )
        query_grad, key_grad, value_grad = (grad.transpose(0, 1)[None] for grad in grads)
        return query_grad, key_grad, value_grad

    @staticmethod
    def _lengths(part: Part) -> tuple[Tensor, Tensor, int, int]:
        assert part.offsets is not None
        return part.offsets[0], part.offsets[1], max(part.query_lengths), max(part.key_lengths)


class CudaEfficient:
    """Memory-efficient attention on CUDA, fp32. Its log-sum-exp stands in padded rows, one for each segment."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> Any:
        """See Kernel."""
        rows, repeats = self._rows(part), query.shape[1] // key.shape[1]
        inputs = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        out, row_lse, *others = ATEN._efficient_attention_forward(
            *(tensor.transpose(1, 2) for tensor in inputs),
            None,
            *CudaFlash._lengths(part),
            0.0,
            CAUSAL if part.causal else NO_MASK,
            True,
            scale=scale,
        )
        lse = row_lse.transpose(0, 1)[:, rows[0], rows[1]]  # [segments, H, longest] -> [H, n]
        return out.transpose(1, 2), lse[None], (*others[:2], row_lse)

    def backward(self, gradient: Tensor, saved: Saved, part: Part, scale: float) -> Gradients:
        """See Kernel."""
        query, key, value, out, lse, others = saved
        rows, kvh, repeats = self._rows(part), key.shape[1], query.shape[1] // key.shape[1]
        seed, offset, plain_lse = others
        row_lse = plain_lse.clone()  # infinite on padding, as the kernel left it
        row_lse.transpose(0, 1)[:, rows[0], rows[1]] = lse[0]
        inputs = (gradient, query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        query_grad, key_grad, value_grad, _ = ATEN._efficient_attention_backward(
            *(tensor.transpose(1, 2) for tensor in inputs),
            None,
            out.transpose(1, 2),
            *CudaFlash._lengths(part),
            row_lse,
            0.0,
            seed,
            offset,
            CAUSAL if part.causal else NO_MASK,
            False,
            scale=scale,
        )
        summed = [grad.transpose(1, 2).unflatten(1, (kvh, repeats)).sum(2) for grad in (key_grad, value_grad)]
        return query_grad.transpose(1, 2), summed[0], summed[1]

    @staticmethod
    def _rows(part: Part) -> tuple[Tensor, Tensor]:
        """For each query its segment, and how far into it the query stands; [n] each."""
        assert part.offsets is not None
        ends = part.offsets[0]
        place = torch.arange(part.queries.stop - part.queries.start, device=ends.device)
        segment = torch.searchsorted(ends, place, right=True, out_int32=True) - 1
        return segment, place - ends[segment]


def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for a device and a type. Raises NotImplementedError where there is none."""
    if device.type == "cpu":
        return CpuFlash()
    if device.type != "cuda":
        raise NotImplementedError("torch has no such kernel")
    return CudaFlash() if dtype in (torch.bfloat16, torch.float16) else CudaEfficient()
