"""Attention of several completions to their shared prompt and to themselves, with scores in memory.

    out = exp(s_prompt - lse) V_prompt + exp(s_own - lse) V_own,   lse = logaddexp(lse_prompt, lse_own)

The exact way where no fused kernel fits (fused_attention.py): on a GPU windows that hide keys, devices without one. The
backward computes the scores again from lse instead of keeping them (FlashAttention, arXiv 2205.14135, algorithm 4).

Shapes: H heads, kvh key heads, r = H / kvh, d head width, Lp tokens of the prompt, n tokens of all completions, b
completions of at most c tokens. Padded rows [b, c] hold the n tokens as `Run` describes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MAX_SCORES = 2**26  # attention scores in memory at once, unless a single head has more: 256 MB
SPARED_SCORES = 2**16  # padded scores per head that a separate run of shorter completions must save


class Run(NamedTuple):
    """Completions of one prompt, of similar lengths: their n tokens as padded rows [b, c], and back."""

    tokens: slice  # where they stand in the flat row, one behind the other
    source: Tensor  # [b, c] int64, which of the n tokens stands at [b, c]; padding: 0
    mask: Tensor  # [b, c] bool, False: padding
    inverse: Tensor  # [n] int64, where in the flattened [b c] each token stands

    @classmethod
    def of(cls, tokens: slice, source: Tensor, mask: Tensor, inverse: Tensor) -> "Run":
        """From the arrays of `padded_arrays` on the device."""
        return cls(tokens, source, mask.bool(), inverse)


class BranchAttention(torch.autograd.Function):
    """query [H, n, d]; keys and values of the prompt [kvh, Lp, d]; of the completions [kvh, n, d] -> [H, n, d].

    Values and the result may have another width than keys (multi-head latent attention).

    index, mask, inverse: those of a `Run`. window: how many of the last keys a token sees, itself
    included; None: all. The softmax is fp32.
    """

    @staticmethod
    def forward(ctx, query, prompt_key, prompt_value, key, value, index, mask, inverse, scale, window):
        prompt_scores, own_scores = _scores(query, prompt_key, key, index, inverse, scale, window)
        # merge the two softmaxes by log-sum-exp
        prompt_lse = prompt_scores.logsumexp(-1)  # [kvh, r, n]
        own_lse = _to_tokens(own_scores.logsumexp(-1), inverse)  # [kvh, r, n]
        lse = torch.logaddexp(prompt_lse, own_lse)
        out = _weighted_values(prompt_scores, own_scores, lse, prompt_value, value, index, inverse)
        ctx.save_for_backward(query, prompt_key, prompt_value, key, value, index, mask, inverse, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, prompt_key, prompt_value, key, value, index, mask, inverse, out, lse = ctx.saved_tensors
        # probabilities, from scores computed again
        prompt_scores, own_scores = _scores(query, prompt_key, key, index, inverse, ctx.scale, ctx.window)
        prompt_probs = prompt_scores.sub_(lse[..., None]).exp_()
        # A padded place repeats a token beside keys of another completion: its value may be anything, even inf.
        own_probs = own_scores.sub_(_to_padded(lse[..., None], index)).exp_().masked_fill_(~mask[..., None], 0)
        heads, tokens, width = query.shape
        kv, repeats = key.shape[0], heads // key.shape[0]
        grad = gradient.reshape(kv, repeats, tokens, -1)
        # sum over keys of probability times its gradient, from the output (the D of FlashAttention)
        row_sum = (gradient * out).float().sum(-1).view(kv, repeats, tokens)
        dtype = query.dtype

        # the prompt's part: values, scores, queries, keys
        flat_grad = grad.reshape(kv, repeats * tokens, -1)
        grad_prompt_value = prompt_probs.to(dtype).view(kv, -1, prompt_probs.shape[-1]).transpose(1, 2) @ flat_grad
        grad_scores = (grad @ prompt_value[:, None].transpose(-1, -2)).float()
        grad_scores = (grad_scores.sub_(row_sum[..., None]).mul_(prompt_probs)).to(dtype)  # [kvh, r, n, Lp]
        grad_query = (grad_scores @ prompt_key[:, None]).mul_(ctx.scale)
        flat_query = query.reshape(kv, repeats * tokens, width)
        flat_scores = grad_scores.view(kv, -1, grad_scores.shape[-1])
        grad_prompt_key = (flat_scores.transpose(1, 2) @ flat_query).mul_(ctx.scale)

        # the completions' own part, in padded rows: values, scores, queries, keys
        keys, values = key[:, index], value[:, index]  # [kvh, b, c, d]
        padded_grad = _to_padded(grad, index).masked_fill(~mask[..., None], 0)  # [kvh, r, b, c, d]
        grad_value = (own_probs.to(dtype).transpose(-1, -2) @ padded_grad).sum(1)
        grad_scores = (padded_grad @ values[:, None].transpose(-1, -2)).float()
        grad_scores = grad_scores.sub_(_to_padded(row_sum[..., None], index)).mul_(own_probs)
        grad_scores = grad_scores.masked_fill_(~mask[..., None], 0).to(dtype)  # [kvh, r, b, c, c]
        own_grad_query = (grad_scores @ keys[:, None]).mul_(ctx.scale)
        padded_query = _to_padded(query.reshape(kv, repeats, tokens, width), index)
        grad_key = (grad_scores.transpose(-1, -2) @ padded_query).sum(1)

        # back from padded rows to tokens
        grad_query = grad_query + _to_tokens(own_grad_query, inverse)
        return (
            grad_query.reshape(heads, tokens, width),
            grad_prompt_key,
            grad_prompt_value,
            _to_tokens(grad_key.mul_(ctx.scale)[:, None], inverse)[:, 0],
            _to_tokens(grad_value[:, None], inverse)[:, 0],
            None,
            None,
            None,
            None,
            None,
        )


def _scores(
    query: Tensor, prompt_key: Tensor, key: Tensor, index: Tensor, inverse: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """fp32 scores on the prompt [kvh, r, n, Lp] and on the own completion [kvh, r, b, c, c]; -inf where masked."""
    kv, length = prompt_key.shape[:2]
    grouped = query.reshape(kv, -1, *query.shape[1:]) * scale  # [kvh, r, n, d]
    prompt_scores = (grouped @ prompt_key[:, None].transpose(-1, -2)).float()
    own_scores = (_to_padded(grouped, index) @ key[:, index][:, None].transpose(-1, -2)).float()
    place = torch.arange(index.shape[1], device=query.device)
    visible = place[:, None] >= place
    if window is not None:
        visible &= place[:, None] - place < window
        steps = place.expand(index.shape).reshape(-1)[inverse]  # [n] how far into its completion each token is
        too_far = (length + steps)[:, None] - torch.arange(length, device=query.device) >= window  # [n, Lp]
        prompt_scores = prompt_scores.masked_fill(too_far, -torch.inf)
    return prompt_scores, own_scores.masked_fill_(~visible, -torch.inf)


def _weighted_values(
    prompt_scores: Tensor,
    own_scores: Tensor,
    lse: Tensor,
    prompt_value: Tensor,
    value: Tensor,
    index: Tensor,
    inverse: Tensor,
) -> Tensor:
    """Values weighted by the probabilities, [H, n, d]. Overwrites the scores."""
    dtype = value.dtype
    prompt_scores.sub_(lse[..., None]).exp_()
    own_scores.sub_(_to_padded(lse[..., None], index)).exp_()
    out = prompt_scores.to(dtype) @ prompt_value[:, None]  # [kvh, r, n, d]
    out = out + _to_tokens(own_scores.to(dtype) @ value[:, index][:, None], inverse)
    return out.reshape(-1, *out.shape[2:])


def _to_padded(tokens: Tensor, index: Tensor) -> Tensor:
    """[kvh, r, n, x] -> [kvh, r, b, c, x]; padding repeats token 0."""
    return tokens[:, :, index]


def _to_tokens(padded: Tensor, inverse: Tensor) -> Tensor:
    """[kvh, r, b, c, ...] -> [kvh, r, n, ...]."""
    return padded.flatten(2, 3).index_select(2, inverse)  # a boolean mask would be a device sync


def attend_by_branches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_length: int,
    prompts: Sequence[slice],
    completions: Sequence[Sequence[Run]],
    scale: float,
    window: int | None,
) -> Tensor:
    """query [1, H, S, d], key and value [1, kvh, S, d] of a flat row (shared_attention.py) -> [1, S, H, d]."""
    prefix = slice(0, prefix_length)
    causal = lambda part: _causal(query[:, :, part], key[:, :, part], value[:, :, part], scale, window)  # noqa: E731
    after = lambda earlier, run: _attend_after(earlier, run, query, key, value, scale, window)  # noqa: E731
    parts = [causal(prefix)] if prefix_length else []
    for prompt in prompts:
        if prefix_length:  # a prompt attends as the single completion of the prefix
            order = torch.arange(prompt.stop - prompt.start, device=query.device)
            alone = Run(prompt, order[None], order[None] >= 0, order)
            parts.append(after([prefix], alone))
        else:
            parts.append(causal(prompt))
    for prompt, runs in zip(prompts, completions, strict=True):
        earlier = [prefix, prompt] if prefix_length else [prompt]
        parts += [after(earlier, run) for run in runs if run.tokens.start < run.tokens.stop]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _attend_after(
    earlier: Sequence[slice], run: Run, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of the completions in `run`, which all continue the tokens in `earlier`: [1, H, n, d]."""
    tokens = run.tokens
    earlier_keys, earlier_values = (
        torch.cat([tensor[0, :, part] for part in earlier], dim=1) for tensor in (key, value)
    )
    keys_values = (earlier_keys, earlier_values, key[0, :, tokens], value[0, :, tokens])
    # heads are independent, so that as many are computed at once as MAX_SCORES allows
    kv, repeats = key.shape[1], query.shape[1] // key.shape[1]
    num_tokens, longest = tokens.stop - tokens.start, run.source.shape[1]
    scores_per_head = repeats * (run.source.numel() * longest + num_tokens * earlier_keys.shape[1])
    step = max(1, MAX_SCORES // max(1, scores_per_head))
    outputs = [
        BranchAttention.apply(
            query[0, first * repeats : (first + step) * repeats, tokens],
            *(part[first : first + step] for part in keys_values),
            *run[1:],
            scale,
            window,
        )
        for first in range(0, kv, step)
    ]
    return torch.cat(outputs)[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Ordinary causal attention, [1, H, L, d]."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (key, value))
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    place = torch.arange(length, device=query.device)
    visible = (place[:, None] >= place) & (place[:, None] - place < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


def cut_runs(start: int, completion_lengths: Sequence[int]) -> list[tuple[slice, tuple[int, ...]]]:
    """Completions from token `start` on, in runs of similar lengths: where each run stands, and its lengths.

    >>> [(run.start, run.stop, lengths) for run, lengths in cut_runs(4, (600, 500, 20, 9))]
    [(4, 1104, (600, 500)), (1104, 1133, (20, 9))]
    """
    runs: list[list[int]] = []
    for i, length in enumerate(completion_lengths):
        longest = max(runs[-1]) if runs else 0
        spared = sum(longest**2 - other**2 for other in completion_lengths[i:])
        if not runs or (2 * length <= longest and spared >= SPARED_SCORES):
            runs.append([])
        runs[-1].append(length)
    ends = (start + np.cumsum([sum(run) for run in runs])).tolist()
    return [(slice(end - sum(run), end), tuple(run)) for end, run in zip(ends, runs, strict=True)]


def padded_arrays(completion_lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """index, mask and inverse of a `Run`."""
    lengths = np.array(completion_lengths, dtype=np.int64)
    steps = np.arange(lengths.max(initial=0))
    mask = steps[None] < lengths[:, None]
    index = np.where(mask, (np.cumsum(lengths) - lengths)[:, None] + steps[None], 0)
    return index, mask, np.flatnonzero(mask)
