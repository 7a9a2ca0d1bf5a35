"""Attention over a flat row in parts, through torch's fused kernels: no scores in memory.

A part is a set of pairs (segment of queries, segment of keys). A token's results over several parts are merged by
their log-sum-exp, and the backward of a part, given the merged result and log-sum-exp, yields the part's share of the
gradients:

    out = sum_p exp(lse_p - lse) out_p,   lse = logsumexp_p lse_p
    P_p = exp(S_p - lse),   dS_p = P_p * (dO V_p' - rowsum(dO * out))      (FlashAttention, arXiv 2205.14135)

A kernel is compared with plain softmax attention once for each type and shape of heads. Where it differs or does not
exist, attention goes through branch_attention.py, which is exact and slow, with a notice.

Shapes: H heads, kvh key heads, S tokens of the flat row, d width of a head.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from grpo.forward import attention_kernels
from grpo.forward.attention_kernels import Kernel, Saved
from grpo.forward.attention_parts import Part, offsets_of, parts_of, positions_of, windowed_parts

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative difference in the check; other types: OTHER_LIMIT
OTHER_LIMIT = 3e-2
LENGTHS = (2, [37, 3], [(70, 1, 33), ()])  # of the check: a prefix, two prompts, their completions
WINDOW = 50  # of the check, in tokens


class FusedAttention(torch.autograd.Function):
    """query [1, H, S, d], key and value [1, kvh, S, d], parts, a kernel, the scale of scores -> [1, H, S, d].

    Every token is a query of the first part; the other parts have some of them.
    """

    @staticmethod
    def forward(ctx, query, key, value, parts, kernel, scale):
        out, lse, extra = kernel.forward(query, key, value, parts[0], scale)
        ctx.extras = [extra]
        for part in parts[1:]:
            queries, keys = part.queries, part.keys
            inputs = (query[:, :, queries], key[:, :, keys], value[:, :, keys])
            part_out, part_lse, extra = kernel.forward(*inputs, part, scale)
            merged = torch.logaddexp(lse[:, :, queries], part_lse)
            share = (part_lse - merged).exp_()[..., None]  # of this part; that of the earlier ones is 1 - share
            if out.dtype == share.dtype:
                out[:, :, queries].lerp_(part_out, share)
            else:
                out[:, :, queries] = torch.lerp(out[:, :, queries].float(), part_out.float(), share)
            lse[:, :, queries] = merged
            ctx.extras.append(extra)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.kernel, ctx.scale = parts, kernel, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, lse = ctx.saved_tensors
        grads: tuple[Tensor, ...] = ()
        for part, extra in zip(ctx.parts, ctx.extras, strict=True):
            own_gradient, own_query, own_out, own_lse = (x[:, :, part.queries] for x in (gradient, query, out, lse))
            saved = Saved(own_query, key[:, :, part.keys], value[:, :, part.keys], own_out, own_lse, extra)
            part_grads = ctx.kernel.backward(own_gradient, saved, part, ctx.scale)
            if not grads:
                grads = part_grads
                continue
            for grad, part_grad, where in zip(grads, part_grads, (part.queries, part.keys, part.keys), strict=True):
                grad[:, :, where] += part_grad
        return *grads, None, None, None


@cache
def fused_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, windowed: bool = False
) -> Kernel | None:
    """The kernel for these heads, compared with plain attention; None, with a warning, where there is none.

    windowed: a window hides keys (attention_parts.py).
    """
    problem = ""
    try:
        if windowed and device.type != "cpu":
            raise NotImplementedError("a window hides keys")
        kernel = attention_kernels.choose(device, dtype)
        gap = difference(kernel, device, dtype, heads, key_heads, width, WINDOW if windowed else None)
        if not gap <= LIMITS.get(dtype, OTHER_LIMIT):
            problem = f"torch's kernel differs from plain attention by {gap:.1e}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises for widths and types that it does not know
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if not problem:
        return kernel
    warnings.warn(
        f"attention of {heads} heads of width {width} in {str(dtype).removeprefix('torch.')} on {device.type} holds "
        f"its scores in memory ({problem[:160]}): slower for long completions, same numbers.",
        stacklevel=2,
    )
    return None


@torch.inference_mode(False)
def difference(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
    window: int | None = None,
) -> float:
    """The largest relative difference of result and gradients from plain attention in float64, on a few tokens."""
    parts = [_on(part, device) for part in parts_of(*LENGTHS)]
    tokens = parts[0].queries.stop
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, tokens, width) for count in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for part in parts:
        for queries, keys in part.pairs:
            block = visible[part.queries, part.keys][queries, keys]
            block |= torch.ones_like(block).tril() if part.causal else True
    if window is not None:
        positions = torch.from_numpy(positions_of(*LENGTHS))
        visible &= positions[:, None] - positions < window
        parts = windowed_parts(*LENGTHS, window)
    results = []
    for exact in (False, True):
        *inputs, gradient = (tensor.double() if exact else tensor for tensor in drawn)
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            if exact:
                query, key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in inputs)
                scores = (query @ key.mT * width**-0.5).masked_fill(~visible.to(device), -torch.inf)
                out = scores.softmax(-1) @ value
            else:
                out = FusedAttention.apply(*inputs, parts, kernel, width**-0.5)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    gaps = [(found.double() - exact).norm() / exact.norm() for found, exact in zip(*results, strict=True)]
    return float(torch.stack(gaps).nan_to_num(nan=torch.inf).amax())


def _on(part: Part, device: torch.device) -> Part:
    """The part with the offsets that kernels of a device need."""
    if device.type == "cpu":
        return part
    offsets = torch.from_numpy(offsets_of(part)).to(device, torch.int32)
    return Part(part.queries, part.keys, part.query_lengths, part.key_lengths, part.causal, offsets)
