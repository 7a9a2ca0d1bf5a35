"""Attention without padding, and with each prompt computed once for all its completions.

A sequence here is a *tree*: a prompt, and the completions that go on from it. Trees lie behind one another in a flat
row of tokens [1, S]; linear layers and norms see no padding, and only attention knows who belongs to whom:

    header token       what all prompts begin with, such as a system prompt: sees the header up to itself
    prompt token       sees the header and its prompt up to itself
    completion token   sees the header, the whole prompt and its own completion up to itself

Models of transformers that ask their attention interface are told to ask `dispatch`, which computes this where a
`Forest` travels along and is transformers' own SDPA otherwise. branch_attention.py is the arithmetic, one tree at a time.

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

from grpo.forward.branch_attention import Crown

NAME = "grpo_trees"
MAX_SCORES = 2**26  # attention scores that exist at once, if one head has no more: 256 MB
SPARED_SCORES = 2**16  # of one head, for which completions of like lengths are computed apart from longer ones
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
    def branch_attention(self) -> slice:
        """All completions."""
        return slice(self.stem.stop, self.stem.stop + sum(self.branches))

    @property
    def parts(self) -> list[tuple[slice, tuple[int, ...]]]:
        """The completions in runs of like lengths: where a run lies in the flat row, and its lengths.

        >>> [(part.start, part.stop, lengths) for part, lengths in Tree(0, 4, (600, 500, 20, 9)).parts]
        [(4, 1104, (600, 500)), (1104, 1133, (20, 9))]
        """
        runs: list[list[int]] = []
        for i, length in enumerate(self.branches):
            longest = max(runs[-1]) if runs else 0
            spared = sum(longest**2 - other**2 for other in self.branches[i:])
            if not runs or (2 * length <= longest and spared >= SPARED_SCORES):
                runs.append([])
            runs[-1].append(length)
        ends = (self.branch_attention.start + np.cumsum([sum(run) for run in runs])).tolist()
        return [(slice(end - sum(run), end), tuple(run)) for end, run in zip(ends, runs, strict=True)]

    @property
    def branch_starts(self) -> list[int]:
        """Where each completion begins."""
        return (self.branch_attention.start + np.cumsum([0, *self.branches[:-1]])).tolist() if self.branches else []


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
        return self.trees[-1].branch_attention.stop

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, S]: a prompt goes on where the header ends, a completion where its prompt ends."""
        return self._placed[0]

    @cached_property
    def lanes(self) -> list[list[tuple[slice, tuple[Tensor, Tensor, Tensor]]]]:
        """For each tree and run: the run, and where in it token c of branch b lies [b, c] (padding: 0).

        And what of that is no padding; and, for the way back, where in [b c] each of the run's n tokens lies.
        """
        places = iter(self._placed[1:])
        return [
            [(here, (next(places), next(places).bool(), next(places))) for here, _ in tree.parts] for tree in self.trees
        ]

    @cached_property
    def _placed(self) -> list[Tensor]:
        """`position_ids`, and the three parts of each run's lanes, int64: in one copy, for which the device stops."""
        parts = [np.arange(self.header)]
        for tree in self.trees:
            parts.append(self.header + np.arange(tree.prompt))
            parts += [self.header + tree.prompt + np.arange(n) for n in tree.branches]
        arrays = [np.concatenate(parts)[None]]
        for tree in self.trees:
            arrays += [lane for _, lengths in tree.parts for lane in _lanes(lengths)]
        values = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64)).to(self.device)
        split = values.split([array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(split, arrays, strict=True)]

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
        for tree, runs in zip(self.trees, self.lanes, strict=True):
            stem = tree.stem
            if self.header:
                order = torch.arange(tree.prompt, device=self.device)
                lane = (order[None], order[None] >= 0, order)
                parts.append(self._branch(query, key, value, [root], stem, lane, scale, window))
            else:
                parts.append(_causal(query[:, :, stem], key[:, :, stem], value[:, :, stem], scale, window))
            for here, lanes in runs:
                if here.start < here.stop:
                    earlier = [root, stem] if self.header else [stem]
                    parts.append(self._branch(query, key, value, earlier, here, lanes, scale, window))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _branch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        earlier: list[slice],
        here: slice,
        lanes: tuple[Tensor, Tensor, Tensor],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Tokens `here`, in lanes, that all go on from the tokens in `earlier`: [1, H, n, d]."""
        before = [torch.cat([tensor[0, :, part] for part in earlier], dim=1) for tensor in (key, value)]
        keys = (*before, key[0, :, here], value[0, :, here])
        kv, repeats = key.shape[1], query.shape[1] // key.shape[1]
        scores = repeats * (lanes[0].numel() * lanes[0].shape[1] + keys[2].shape[1] * before[0].shape[1])
        step = max(1, MAX_SCORES // max(1, scores))  # heads at once: they know nothing of each other
        made = [
            Crown.apply(
                query[0, first * repeats : (first + step) * repeats, here],
                *(part[first : first + step] for part in keys),
                *lanes,
                scale,
                window,
            )
            for first in range(0, kv, step)
        ]
        return torch.cat(made)[None]


def _lanes(branches: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one run, as `Forest.lanes` says."""
    lengths = np.array(branches, dtype=np.int64)
    steps = np.arange(lengths.max(initial=0))
    here = steps[None] < lengths[:, None]
    index = np.where(here, (np.cumsum(lengths) - lengths)[:, None] + steps[None], 0)
    return index, here, np.flatnonzero(here)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Ordinary causal attention over one prompt: [1, H, L, d]."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (key, value))
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    at = torch.arange(length, device=query.device)
    seen = (at[:, None] >= at) & (at[:, None] - at < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    trees: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What models call: attention over `trees` where they travel along, else transformers' SDPA."""
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return trees.attend(module.layer_idx, query, key, value, scale, sliding_window), None


# cuDNN's attention, which torch prefers on the newest GPUs, has given silently wrong numbers with a mask (pytorch issue
# 193893, forward; 196678, backward), and it plans anew for every length. The other kernels remain.
torch.backends.cuda.enable_cudnn_sdp(False)

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
