"""What the engine remembers of B rows while it decodes: the keys and values of their prompts and of their own tokens.

`SharedCache` holds each prompt once for all rows that go on from it, and what all prompts begin with once for all rows;
a decode step reads it as often. It needs a model whose attention is transformers' (grpo/attention.py). `PlainCache` is
transformers' own, a prompt's keys and values repeated for each row; it serves every other model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo.attention import Forest, Tree
from grpo.flattening import common_header
from grpo.logprobs import Head
from grpo.rollout import Request

PREFILL_TOKENS = 8192  # prompts computed at once
FIRST_ROOM = 64  # tokens of a completion that room is made for at first; then twice as many, and so on
NEVER = -1e30  # below every score, and still finite


class PlainCache:
    """Prompts padded on the left to the longest, one column for all rows; transformers' DynamicCache."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int):
        self.model = model
        self.requests = requests
        self.max_new_tokens = max_new_tokens

    def prefill(self) -> Tensor:
        """Compute each distinct prompt once; logits [B, V] of the first token."""
        distinct, rows = _distinct(self.requests, self.model.device)
        longest = max(map(len, distinct))
        input_ids = torch.zeros(len(distinct), longest, dtype=torch.int64)
        mask = torch.zeros(len(distinct), longest + self.max_new_tokens, dtype=torch.int64)
        for i, ids in enumerate(distinct):
            input_ids[i, longest - len(ids) :] = torch.tensor(ids)
            mask[i, longest - len(ids) :] = 1
        input_ids, mask = input_ids.to(self.model.device), mask.to(self.model.device)
        positions = (mask[:, :longest].cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=input_ids, attention_mask=mask[:, :longest], position_ids=positions, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        if len(self.requests) > 1 or len(distinct) > 1:
            self.cache.batch_select_indices(rows)
        self.mask, self.position, self.column = mask[rows], positions[rows, -1] + 1, longest
        return logits[rows]

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def decode(self, token_ids: Tensor) -> Tensor:
        """Take each row's next token [B]; logits [B, V] of the one after."""
        self.column += 1
        logits = self.model(
            input_ids=token_ids[:, None], attention_mask=self.mask[:, : self.column],
            position_ids=self.position[:, None], past_key_values=self.cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
        self.position = self.position + 1
        return logits


class SharedCache:
    """Each prompt once; own tokens of row b at own[layer][..., b, :, t, :]. Travels into the attention as `trees`."""

    def __init__(self, head: Head, requests: Sequence[Request], max_new_tokens: int):
        self.head = head
        self.device = head.model.device
        self.max_new_tokens = max_new_tokens
        self.requests = requests
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [kvh, Lh, d] of the header
        self.stems: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [kvh, P, Lp, d] of prompts after it
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [B, kvh, room, d]
        self.time = 0  # own tokens of every row so far
        self.placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def prefill(self) -> Tensor:
        """Compute each distinct prompt once, without padding; logits [B, V] of the first token."""
        distinct, self.prompt_of = _distinct(self.requests, self.device)
        self.header = common_header(distinct)
        head, distinct = distinct[0][: self.header], [ids[self.header :] for ids in distinct]
        self.lengths = torch.tensor([len(ids) for ids in distinct], device=self.device)
        longest = int(self.lengths.max())
        at = torch.arange(longest, device=self.device)
        self.before = self.lengths[:, None] - at  # [P, Lp] how far key j lies before its prompt's end; <= 0: padding
        logits: list[Tensor] = []
        for part in _parts(distinct):
            forest = Forest(_stems(part, self.header), self.device, self.header)
            forest.prompts = {}
            row = torch.tensor([*head, *(token for ids in part for token in ids)], device=self.device)[None]
            hidden = self.head.body()(input_ids=row, **forest.inputs()).last_hidden_state
            ends = torch.tensor([tree.stem.stop for tree in forest.trees], device=self.device)
            logits.append(self.head.logits(hidden[0, ends - 1]))
            starts = torch.tensor([tree.start for tree in forest.trees], device=self.device)
            index = torch.minimum(starts[:, None] + at, ends[:, None] - 1)  # [P, Lp]
            for layer, both in forest.prompts.items():
                self.heads[layer] = (both[0][0, :, : self.header], both[1][0, :, : self.header])
                gathered = tuple(tensor[0][:, index] for tensor in both)
                earlier = self.stems.get(layer)
                self.stems[layer] = tuple(  # type: ignore[assignment]
                    torch.cat([old, new], 1) for old, new in zip(earlier, gathered, strict=True)
                ) if earlier else gathered  # fmt: skip
        self._place()
        return torch.cat(logits)[self.prompt_of]

    def _place(self) -> None:
        """Where the rows stand when they are gathered by prompt: slots [P, g] -> row; row -> (prompt, slot)."""
        counts = torch.bincount(self.prompt_of, minlength=len(self.lengths))
        order = torch.argsort(self.prompt_of, stable=True)
        slot = torch.empty_like(self.prompt_of)
        slot[order] = torch.arange(len(order), device=self.device) - (counts.cumsum(0) - counts)[self.prompt_of[order]]
        self.slot = slot
        self.slots = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64, device=self.device)
        self.slots[self.prompt_of, slot] = torch.arange(len(slot), device=self.device)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on; prompts that no row needs leave once they are half of all."""
        self.prompt_of = self.prompt_of[rows]
        for layer, (keys, values) in self.own.items():
            self.own[layer] = (keys[rows], values[rows])
        used = torch.unique(self.prompt_of)
        if 2 * len(used) <= len(self.lengths):
            for layer, (keys, values) in self.stems.items():
                self.stems[layer] = (keys[:, used], values[:, used])
            self.lengths, self.before = self.lengths[used], self.before[used]
            self.prompt_of = torch.searchsorted(used, self.prompt_of)
        self._place()

    def decode(self, token_ids: Tensor) -> Tensor:
        """Take each row's next token [B]; logits [B, V] of the one after."""
        position_ids = (self.header + self.lengths[self.prompt_of] + self.time)[:, None]
        hidden = self.head.body()(
            input_ids=token_ids[:, None], position_ids=position_ids, attention_mask=self.placeholder, use_cache=False,
            trees=self,
        ).last_hidden_state  # fmt: skip
        self.time += 1
        return self.head.logits(hidden[:, 0])

    def _own(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's keys and values [B, kvh, 1, d]; those of all own tokens so far, [B, kvh, t, d]."""
        both = self.own.get(layer)
        if both is None or both[0].shape[2] == self.time:
            room = min(self.max_new_tokens, max(FIRST_ROOM, 2 * self.time))
            larger = tuple(new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (key, value))
            for old, new in zip(both or (), larger, strict=bool(both)):
                new[:, :, : self.time] = old
            self.own[layer] = both = (larger[0], larger[1])
        for buffer, new in zip(both, (key, value), strict=True):
            buffer[:, :, self.time] = new[:, :, 0]
        return both[0][:, :, : self.time + 1], both[1][:, :, : self.time + 1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """One token of each row: query [B, H, 1, d], key and value [B, kvh, 1, d] -> [B, 1, H, d].

        Attention to the prompt, gathered by prompt, and to the row's own tokens are merged by their sums:
        (e^(a-m) A + e^(b-m) B) / (e^(a-m) sum A + e^(b-m) sum B), with a, b the largest score of each and m of both.
        """
        kind = self.stems[layer][0].dtype
        query, key, value = (query * scale).to(kind), key.to(kind), value.to(kind)
        rows, heads, _, width = query.shape
        kv = key.shape[1]
        query = query.view(rows, kv, heads // kv, width)
        keys, values = self._own(layer, key, value)
        own_scores = query @ keys.transpose(-1, -2)  # [B, kvh, r, t]
        if window is not None and window <= self.time:
            own_scores[..., : self.time + 1 - window] = NEVER
        parts = [_unnormalised(own_scores, values)]
        if self.header:
            parts.append(self._header(layer, query, window))

        stem_keys, stem_values = self.stems[layer]
        gathered = query[self.slots].permute(2, 0, 1, 3, 4)  # [kvh, P, g, r, d]
        _, prompts, slots, repeats, _ = gathered.shape
        gathered = gathered.reshape(kv, prompts, slots * repeats, width)
        scores = gathered @ stem_keys.transpose(-1, -2)  # [kvh, P, g r, Lp]
        hidden = self.before <= 0
        if window is not None:
            hidden = hidden | (self.before + self.time >= window)
        scores.masked_fill_(hidden[:, None], NEVER)
        top, total, out = (
            part.view(kv, prompts, slots, repeats, -1)[:, self.prompt_of, self.slot].transpose(0, 1)  # [B, kvh, r, .]
            for part in _unnormalised(scores, stem_values)
        )
        for top_here, total_here, out_here in parts:
            most = torch.maximum(top, top_here)
            a, b = (top - most).exp_(), (top_here - most).exp_()
            top, total, out = most, total * a + total_here * b, out * a + out_here * b
        return (out / total).to(kind).reshape(rows, 1, heads, width)

    def _header(self, layer: int, query: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """All rows' attention to the header, read once for all of them: as `_unnormalised`, [B, kvh, r, .]."""
        keys, values = self.heads[layer]
        rows, kv, repeats, width = query.shape
        scores = query.transpose(0, 1).reshape(kv, rows * repeats, width) @ keys.transpose(-1, -2)  # [kvh, B r, Lh]
        if window is not None:
            at = torch.arange(self.header, device=self.device)
            far = self.header + self.lengths[self.prompt_of, None] + self.time - at >= window  # [B, Lh]
            scores.masked_fill_(far.repeat_interleave(repeats, 0), NEVER)
        found = _unnormalised(scores, values)
        top, total, out = (part.view(kv, rows, repeats, -1).transpose(0, 1) for part in found)
        return top, total, out


def _unnormalised(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [..., q, k], values [..., k, d] -> largest score, sum of exponentials (both [..., q, 1]), weighted sum."""
    scores = scores.float()
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), (weights.to(values.dtype) @ values).float()


def _distinct(requests: Sequence[Request], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """The distinct prompts, and which of them each request has, [B]."""
    distinct = list(dict.fromkeys(request.prompt_ids for request in requests))
    which = {ids: i for i, ids in enumerate(distinct)}
    return distinct, torch.tensor([which[request.prompt_ids] for request in requests], device=device)


def _parts(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prompts in their order, cut so that each part holds at most PREFILL_TOKENS, one prompt at least."""
    parts: list[list[tuple[int, ...]]] = []
    for ids in prompts:
        if not parts or sum(map(len, parts[-1])) + len(ids) > PREFILL_TOKENS:
            parts.append([])
        parts[-1].append(ids)
    return parts


def _stems(prompts: list[tuple[int, ...]], header: int) -> list[Tree]:
    trees: list[Tree] = []
    for ids in prompts:
        trees.append(Tree(trees[-1].stem.stop if trees else header, len(ids)))
    return trees


def open_cache(head: Head, shares: bool, requests: Sequence[Request], max_new_tokens: int) -> Any:
    """The cache for a model: shared where its attention can, else transformers' own."""
    return SharedCache(head, requests, max_new_tokens) if shares else PlainCache(head.model, requests, max_new_tokens)
