"""Attention of several completions to their shared prompt and to themselves, with a backward of its own.

    out = exp(s_prompt - lse) V_prompt + exp(s_own - lse) V_own,   lse = logaddexp(lse_prompt, lse_own)

Scores are computed again in the backward, from lse (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

import torch
from torch import Tensor


class Crown(torch.autograd.Function):
    """Completions attending to their shared prompt and to themselves.

    query [H, n, d]; stem keys and values [kvh, Lp, d]; own keys and values [kvh, n, d]; index and here
    [b, c], order [n] as in `Forest.lanes`. Returns [H, n, d]. Softmax in fp32.
    """

    @staticmethod
    def forward(ctx, query, stem_key, stem_value, key, value, index, here, order, scale, window):  # noqa: D102
        stem, own = _scores(query, stem_key, key, index, order, scale, window)
        stem_lse = stem.logsumexp(-1)  # [kvh, r, n]
        own_lse = _to_tokens(own.logsumexp(-1), order)  # [kvh, r, n]
        lse = torch.logaddexp(stem_lse, own_lse)
        out = _weigh(stem, own, lse, stem_value, value, index, order)
        ctx.save_for_backward(query, stem_key, stem_value, key, value, index, here, order, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        query, stem_key, stem_value, key, value, index, here, order, out, lse = ctx.saved_tensors
        stem, own = _scores(query, stem_key, key, index, order, ctx.scale, ctx.window)
        stem = stem.sub_(lse[..., None]).exp_()  # probabilities
        # A padded lane repeats a token beside keys that are not its own: its numbers may be anything, even inf.
        own = own.sub_(_to_lanes(lse[..., None], index)).exp_().masked_fill_(~here[..., None], 0)
        heads, tokens, width = query.shape
        kv, repeats = key.shape[0], heads // key.shape[0]
        grad = gradient.reshape(kv, repeats, tokens, width)
        inner = (gradient * out).float().sum(-1).view(kv, repeats, tokens)
        kind = query.dtype

        flat = grad.reshape(kv, repeats * tokens, width)
        grad_stem_value = stem.to(kind).view(kv, -1, stem.shape[-1]).transpose(1, 2) @ flat
        slope = (grad @ stem_value[:, None].transpose(-1, -2)).float()
        slope = (slope.sub_(inner[..., None]).mul_(stem)).to(kind)  # [kvh, r, n, Lp]
        grad_query = (slope @ stem_key[:, None]).mul_(ctx.scale)
        queries = query.reshape(kv, repeats * tokens, width)
        grad_stem_key = (slope.view(kv, -1, slope.shape[-1]).transpose(1, 2) @ queries).mul_(ctx.scale)

        keys, values = key[:, index], value[:, index]  # [kvh, b, c, d]
        lanes = _to_lanes(grad, index).masked_fill(~here[..., None], 0)  # [kvh, r, b, c, d]
        grad_value = (own.to(kind).transpose(-1, -2) @ lanes).sum(1)
        slope = (lanes @ values[:, None].transpose(-1, -2)).float()
        slope = slope.sub_(_to_lanes(inner[..., None], index)).mul_(own).masked_fill_(~here[..., None], 0).to(kind)
        own_query = (slope @ keys[:, None]).mul_(ctx.scale)
        grad_key = (slope.transpose(-1, -2) @ _to_lanes(query.reshape(kv, repeats, tokens, width), index)).sum(1)
        grad_query = grad_query + _to_tokens(own_query, order)
        return (
            grad_query.reshape(heads, tokens, width),
            grad_stem_key,
            grad_stem_value,
            _to_tokens(grad_key.mul_(ctx.scale)[:, None], order)[:, 0],
            _to_tokens(grad_value[:, None], order)[:, 0],
            None,
            None,
            None,
            None,
            None,
        )


def _scores(
    query: Tensor, stem_key: Tensor, key: Tensor, index: Tensor, order: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Scores, fp32: on the prompt [kvh, r, n, Lp], on the own completion [kvh, r, b, c, c], -inf where unseen."""
    kv, length = stem_key.shape[:2]
    grouped = query.reshape(kv, -1, *query.shape[1:]) * scale  # [kvh, r, n, d]
    stem = (grouped @ stem_key[:, None].transpose(-1, -2)).float()
    own = (_to_lanes(grouped, index) @ key[:, index][:, None].transpose(-1, -2)).float()
    at = torch.arange(index.shape[1], device=query.device)
    seen = at[:, None] >= at
    if window is not None:
        seen &= at[:, None] - at < window
        steps = at.expand(index.shape).reshape(-1)[order]  # [n] how far into its completion each token is
        unseen = (length + steps)[:, None] - torch.arange(length, device=query.device) >= window  # [n, Lp]
        stem = stem.masked_fill(unseen, -torch.inf)
    return stem, own.masked_fill_(~seen, -torch.inf)


def _weigh(
    stem: Tensor, own: Tensor, lse: Tensor, stem_value: Tensor, value: Tensor, index: Tensor, order: Tensor
) -> Tensor:
    """Probabilities from scores, and the values they weigh: [H, n, d]. Overwrites the scores."""
    kind = value.dtype
    stem.sub_(lse[..., None]).exp_()
    own.sub_(_to_lanes(lse[..., None], index)).exp_()
    out = stem.to(kind) @ stem_value[:, None]  # [kvh, r, n, d]
    out = out + _to_tokens(own.to(kind) @ value[:, index][:, None], order)
    return out.reshape(-1, *out.shape[2:])


def _to_lanes(values: Tensor, index: Tensor) -> Tensor:
    """[kvh, r, n, x] -> [kvh, r, b, c, x]; padding repeats a token."""
    return values[:, :, index]


def _to_tokens(lanes: Tensor, order: Tensor) -> Tensor:
    """[kvh, r, b, c, ...] -> [kvh, r, n, ...], in the branch_attention's order."""
    return lanes.flatten(2, 3).index_select(2, order)  # no boolean mask: it would wait for the device
