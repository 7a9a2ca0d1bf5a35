"""Attention without padding, and with each prompt computed once for all its completions.

A sequence here is a *tree*: a prompt, and the completions that go on from it. Trees lie behind one another in a flat
row of tokens [1, S]; linear layers and norms see no padding, and only attention knows who belongs to whom:

    header token       what all prompts begin with, such as a system prompt: sees the header up to itself
    prompt token       sees the header and its prompt up to itself
    completion token   sees the header, the whole prompt and its own completion up to itself

    out = exp(s_prompt - lse) V_prompt + exp(s_own - lse) V_own,   lse = logaddexp(lse_prompt, lse_own)

Models of transformers that ask their attention interface are told to ask `dispatch`, which computes this where a
`Forest` travels along and is transformers' own SDPA otherwise. Scores of one tree exist at a time; the backward
recomputes them from lse (FlashAttention, arXiv 2205.14135, algorithm 4).

Whether a model's attention is this one is checked against the model itself (`can_share`), never assumed.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grpo_trees"
MAX_DIFFERENCE = {False: 1e-3, True: 5e-2}  # to the model's own hidden states, relative: rounding; True: in bf16


@dataclass(frozen=True)
class Tree:
    """One prompt and its completions in the flat row: the prompt's tokens after the header, then each completion's."""

    start: int
    prompt: int  # tokens
    branches: tuple[int, ...] = ()  # tokens of each completion

    @property
    def stem(self) -> slice:
        """The prompt."""
        return slice(self.start, self.start + self.prompt)

    @property
    def crown(self) -> slice:
        """All completions."""
        return slice(self.stem.stop, self.stem.stop + sum(self.branches))

    @property
    def branch_starts(self) -> list[int]:
        """Where each completion begins."""
        return (self.crown.start + np.cumsum([0, *self.branches[:-1]])).tolist() if self.branches else []


class Forest:
    """The trees of one forward, and where their tokens stand."""

    def __init__(self, trees: Sequence[Tree], device: torch.device, header: int = 0):
        """header: tokens at the start of the flat row that all prompts go on from."""
        self.trees = tuple(trees)
        self.header = header
        self.device = device
        self.calls = 0  # of `attend`; 0 after a forward: the model does not ask
        self.prompts: dict[int, tuple[Tensor, Tensor]] | None = None  # layer -> keys, values [1, kvh, S, d], if kept

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.trees[-1].crown.stop

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, S]: a prompt goes on where the header ends, a completion where its prompt ends."""
        parts = [np.arange(self.header)]
        for tree in self.trees:
            parts.append(self.header + np.arange(tree.prompt))
            parts += [self.header + tree.prompt + np.arange(n) for n in tree.branches]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(self.device)

    @cached_property
    def lanes(self) -> list[tuple[Tensor, Tensor]]:
        """For each tree: where in its crown token c of branch b lies [b, c] (padding: 0), and what is no padding."""
        found = []
        for tree in self.trees:
            lengths = np.array(tree.branches, dtype=np.int64)
            steps = np.arange(lengths.max(initial=0))
            here = steps[None] < lengths[:, None]
            index = np.where(here, (np.cumsum(lengths) - lengths)[:, None] + steps[None], 0)
            found.append((torch.from_numpy(index).to(self.device), torch.from_numpy(here).to(self.device)))
        return found

    def inputs(self) -> dict[str, Any]:
        """What a model's forward needs beside input_ids. The mask is a placeholder: no mask is built for four axes."""
        placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return {"position_ids": self.position_ids, "attention_mask": placeholder, "use_cache": False, "trees": self}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, H, S, d], key and value [1, kvh, S, d] -> [1, S, H, d]."""
        self.calls += 1
        if torch.is_autocast_enabled(query.device.type):  # as SDPA does, and the backward then too
            kind = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(kind), key.to(kind), value.to(kind)
        if self.prompts is not None:
            self.prompts[layer] = (key, value)
        root = slice(0, self.header)
        parts = [_causal(query[:, :, root], key[:, :, root], value[:, :, root], scale, window)] if self.header else []
        for tree, (index, here) in zip(self.trees, self.lanes, strict=True):
            stem, crown = tree.stem, tree.crown
            if self.header:
                lane = torch.arange(tree.prompt, device=self.device)[None]
                parts.append(self._branch(query, key, value, [root], stem, lane, lane >= 0, scale, window))
            else:
                parts.append(_causal(query[:, :, stem], key[:, :, stem], value[:, :, stem], scale, window))
            if crown.start < crown.stop:
                earlier = [root, stem] if self.header else [stem]
                parts.append(self._branch(query, key, value, earlier, crown, index, here, scale, window))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _branch(
        self, query: Tensor, key: Tensor, value: Tensor, earlier: list[slice], here: slice, index: Tensor,
        real: Tensor, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Tokens `here`, in lanes, that all go on from the tokens in `earlier`: [1, H, n, d]."""
        before = [torch.cat([tensor[0, :, part] for part in earlier], dim=1) for tensor in (key, value)]
        own = (key[0, :, here], value[0, :, here])
        made: Tensor = Crown.apply(query[0, :, here], *before, *own, index, real, scale, window)
        return made[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Ordinary causal attention over one prompt: [1, H, L, d]."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (key, value))
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    at = torch.arange(length, device=query.device)
    seen = (at[:, None] >= at) & (at[:, None] - at < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


class Crown(torch.autograd.Function):
    """Completions attending to their shared prompt and to themselves.

    query [H, n, d]; stem keys and values [kvh, Lp, d]; own keys and values [kvh, n, d]; index, here [b, c] as in
    `Forest.lanes`. Returns [H, n, d]. Softmax in fp32.
    """

    @staticmethod
    def forward(ctx, query, stem_key, stem_value, key, value, index, here, scale, window):  # noqa: D102
        stem, own = _scores(query, stem_key, key, index, here, scale, window)
        stem_lse = stem.logsumexp(-1)  # [kvh, r, n]
        own_lse = _to_tokens(own.logsumexp(-1), here)  # [kvh, r, n]
        lse = torch.logaddexp(stem_lse, own_lse)
        out = _weigh(stem, own, lse, stem_value, value, index, here)
        ctx.save_for_backward(query, stem_key, stem_value, key, value, index, here, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        query, stem_key, stem_value, key, value, index, here, out, lse = ctx.saved_tensors
        stem, own = _scores(query, stem_key, key, index, here, ctx.scale, ctx.window)
        stem = stem.sub_(lse[..., None]).exp_()  # probabilities
        own = own.sub_(_to_lanes(lse[..., None], index)).exp_()
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
        grad_query = grad_query + _to_tokens(own_query, here)
        return (
            grad_query.reshape(heads, tokens, width), grad_stem_key, grad_stem_value,
            _to_tokens(grad_key.mul_(ctx.scale)[:, None], here)[:, 0], _to_tokens(grad_value[:, None], here)[:, 0],
            None, None, None, None,
        )  # fmt: skip


def _scores(
    query: Tensor, stem_key: Tensor, key: Tensor, index: Tensor, here: Tensor, scale: float, window: int | None
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
        steps = at.expand_as(here)[here]  # [n] how far into its completion each token is
        unseen = (length + steps)[:, None] - torch.arange(length, device=query.device) >= window  # [n, Lp]
        stem = stem.masked_fill(unseen, -torch.inf)
    return stem, own.masked_fill_(~seen, -torch.inf)


def _weigh(
    stem: Tensor, own: Tensor, lse: Tensor, stem_value: Tensor, value: Tensor, index: Tensor, here: Tensor
) -> Tensor:
    """Probabilities from scores, and the values they weigh: [H, n, d]. Overwrites the scores."""
    kind = value.dtype
    stem.sub_(lse[..., None]).exp_()
    own.sub_(_to_lanes(lse[..., None], index)).exp_()
    out = stem.to(kind) @ stem_value[:, None]  # [kvh, r, n, d]
    out = out + _to_tokens(own.to(kind) @ value[:, index][:, None], here)
    return out.reshape(-1, *out.shape[2:])


def _to_lanes(values: Tensor, index: Tensor) -> Tensor:
    """[kvh, r, n, x] -> [kvh, r, b, c, x]; padding repeats a token."""
    return values[:, :, index]


def _to_tokens(lanes: Tensor, here: Tensor) -> Tensor:
    """[kvh, r, b, c, ...] -> [kvh, r, n, ...], in the crown's order."""
    return lanes[:, :, here]


def dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, trees: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What models call: attention over `trees` where they travel along, else transformers' SDPA."""
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return trees.attend(module.layer_idx, query, key, value, scale, sliding_window), None


AttentionInterface.register(NAME, dispatch)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_trees(model: PreTrainedModel) -> None:
    """Make a model ask `dispatch`, where it asks anybody; nothing else changes."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


@torch.no_grad()
def can_share(model: PreTrainedModel, body: nn.Module) -> bool:
    """Whether a model computes over trees what it computes over rows: tried on a few tokens.

    On every rank alike: a sharded model's forward is a collective. A model that differs is left to its own forward,
    with a notice.
    """
    ids = torch.arange(9, device=model.device) % int(model.config.get_text_config().vocab_size)
    prompt, branches = ids[:4], (ids[4:7], ids[5:9])
    own = [body(input_ids=torch.cat([prompt, b])[None], use_cache=False).last_hidden_state[0, 4:] for b in branches]
    forest = Forest([Tree(0, 4, (3, 4))], model.device)
    problem = ""
    try:
        flat = torch.cat([prompt, *branches])[None]
        ours = body(input_ids=flat, **forest.inputs()).last_hidden_state[0, 4:].split((3, 4))
        if forest.calls == 0:
            problem = "its attention is not transformers' attention interface"
        else:
            size = max(float(hidden.abs().amax()) for hidden in own)
            gap = max(float((a - b).abs().amax()) for a, b in zip(own, ours, strict=True))
            limit = MAX_DIFFERENCE[torch.is_autocast_enabled(model.device.type)]
            if math.isfinite(size) and not gap <= limit * max(size, 1.0):
                problem = f"hidden states differ by {gap / max(size, 1.0):.1e}"
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(
            f"{type(model).__name__}: each prompt is computed anew for each of its completions, and rows are padded "
            f"({problem[:200]}): slower, same numbers.",
            stacklevel=2,
        )
    return not problem
