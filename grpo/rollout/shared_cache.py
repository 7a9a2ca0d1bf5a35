"""Keys and values while decoding, each prompt once for all rows that go on from it.

What all prompts begin with stands once for all rows, each prompt once for its group, and own tokens by row; a decode
step reads them as often. Where prompts are short or rows are few, each row has a copy of its prompt instead: then one
call of torch's own attention is faster than several of ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo.attention import MAX_DIFFERENCE, Forest, Tree
from grpo.flattening import common_header
from grpo.logprobs import Head
from grpo.rollout import Request
from grpo.rollout.lean import LeanBody, lean_body

PREFILL_TOKENS = 8192  # prompts computed at once
SHORT_PROMPT = 128  # tokens; such prompts are copied for each row: one call reads them faster than several
FEW_ROWS = 4  # so few rows get copies of any prompt
FIRST_ROOM = 64  # tokens of a completion that room is made for at first; then twice as many, and so on
NEVER = -1e30  # below every score, and still finite


class SharedCache:
    """Each prompt once; own tokens of row b at own[layer][..., b, :, t, :]. Travels into the attention as `trees`."""

    def __init__(self, head: Head, requests: Sequence[Request], max_new_tokens: int, lean: LeanBody | None = None):
        """lean: the body in a form that decodes with fewer calls."""
        self.head = head
        self.lean = lean
        self.device = head.model.device
        self.max_new_tokens = max_new_tokens
        self.requests = requests
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [kvh, Lh, d] of the header
        self.stems: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [kvh, P, Lp, d] of prompts after it
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [B, kvh, room, d]
        self.time = 0  # own tokens of every row so far
        self.by_row = False  # whether each row has a copy of its prompt, in front of its own tokens
        self.placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def prefill(self) -> Tensor:
        """Compute each distinct prompt once, without padding; logits [B, V] of the first token."""
        distinct, self.prompt_of = distinct_prompts(self.requests, self.device)
        self.header = common_header(distinct)
        head, distinct = distinct[0][: self.header], [ids[self.header :] for ids in distinct]
        self.lengths = torch.tensor([len(ids) for ids in distinct], device=self.device)
        self.even = len({len(ids) for ids in distinct}) == 1
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
                self.heads[layer] = (both[0][0, :, : self.header].clone(), both[1][0, :, : self.header].clone())
                gathered = tuple(tensor[0][:, index] for tensor in both)
                earlier = self.stems.get(layer)
                self.stems[layer] = tuple(  # type: ignore[assignment]
                    torch.cat([old, new], 1) for old, new in zip(earlier, gathered, strict=True)
                ) if earlier else gathered  # fmt: skip
        self._place()
        self._choose()
        return torch.cat(logits)[self.prompt_of]

    def _choose(self) -> None:
        """Few keys, or few rows, are faster read by row, in one call, than shared, in several."""
        rows, columns = len(self.prompt_of), self.header + self.before.shape[1]
        if self.by_row or (columns > SHORT_PROMPT and rows > FEW_ROWS):
            return
        self.by_row = True
        self.columns = columns  # of the prompt, in front of the row's own
        for layer, (keys, values) in self.stems.items():
            own = self.own.get(layer, (None, None))
            row = []
            for head, stem, said in zip(self.heads[layer], (keys, values), own, strict=True):
                room = min(self.max_new_tokens, max(FIRST_ROOM, 2 * self.time))
                buffer = stem.new_empty(rows, len(stem), columns + room, stem.shape[-1])
                buffer[:, :, : self.header] = head
                buffer[:, :, self.header : columns] = stem[:, self.prompt_of].transpose(0, 1)
                if said is not None:
                    buffer[:, :, columns : columns + self.time] = said[:, :, : self.time]
                row.append(buffer)
            self.own[layer] = (row[0], row[1])
        self.stems.clear()
        self.heads.clear()

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
        self._choose()
        used = torch.unique(self.prompt_of)
        if not self.by_row and 2 * len(used) <= len(self.lengths):
            for layer, (keys, values) in self.stems.items():
                self.stems[layer] = (keys[:, used], values[:, used])
            self.lengths, self.before = self.lengths[used], self.before[used]
            self.prompt_of = torch.searchsorted(used, self.prompt_of)
        self._place()

    def decode(self, token_ids: Tensor) -> Tensor:
        """Take each row's next token [B]; logits [B, V] of the one after."""
        position_ids = (self.header + self.lengths[self.prompt_of] + self.time)[:, None]
        if self.lean is not None:
            hidden = self.lean(token_ids[:, None], position_ids, self)
        else:
            hidden = self.head.body()(
                input_ids=token_ids[:, None], position_ids=position_ids, attention_mask=self.placeholder,
                use_cache=False, trees=self,
            ).last_hidden_state  # fmt: skip
        self.time += 1
        return self.head.logits(hidden[:, 0])

    def _own(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's keys and values [B, kvh, 1, d]; those of all own tokens so far, [B, kvh, t, d]."""
        both = self.own.get(layer)
        front = self.columns if self.by_row else 0
        at = front + self.time
        if both is None or both[0].shape[2] == at:
            room = front + min(self.max_new_tokens, max(FIRST_ROOM, 2 * self.time))
            larger = tuple(new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (key, value))
            for old, new in zip(both or (), larger, strict=bool(both)):
                new[:, :, :at] = old
            self.own[layer] = both = (larger[0], larger[1])
        for buffer, new in zip(both, (key, value), strict=True):
            buffer[:, :, at] = new[:, :, 0]
        return both[0][:, :, : at + 1], both[1][:, :, : at + 1]

    def _seen(self, window: int | None) -> Tensor | None:
        """Which of its columns each row sees, [B, n] bool; None: all. Only where each row has its own."""
        length = self.lengths[self.prompt_of, None]
        hidden = self.before.shape[1]
        if window is None or window > self.header + hidden + self.time:
            if self.even:
                return None
            at = torch.arange(self.columns + self.time + 1, device=self.device) - self.header
            return (at < length) | (at >= hidden)
        at = torch.arange(self.columns + self.time + 1, device=self.device) - self.header
        own = at >= hidden
        distance = torch.where(own, self.time - (at - hidden), length + self.time - at)
        return (own | (at < length)) & (distance < window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """One token of each row: query [B, H, 1, d], key and value [B, kvh, 1, d] -> [B, 1, H, d].

        Attention to the prompt, gathered by prompt, and to the row's own tokens are merged by their sums:
        (e^(a-m) A + e^(b-m) B) / (e^(a-m) sum A + e^(b-m) sum B), with a, b the largest score of each and m of both.
        """
        kind = (self.own if self.by_row else self.stems)[layer][0].dtype
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        rows, heads, _, width = query.shape
        kv = key.shape[1]
        query = query.view(rows, kv, heads // kv, width)
        keys, values = self._own(layer, key, value)
        if self.by_row:
            seen = self._seen(window)
            mask = None if seen is None else seen[:, None, None].expand(-1, 1, heads // kv, -1)
            found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
            return found.reshape(rows, 1, heads, width)
        query = query * scale
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


def distinct_prompts(requests: Sequence[Request], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
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


def checked_lean(head: Head) -> LeanBody | None:
    """The lean body, when it is the model's own forward up to rounding; None where there is none, or it is not."""
    body = lean_body(head.model, head.body())
    if body is None:
        return None
    request = Request(0, 0, 0, tuple(i % head.vocab_size for i in range(5)))
    own, lean = SharedCache(head, [request], 2), SharedCache(head, [request], 2, body)
    token = own.prefill().argmax(-1)
    lean.prefill()
    try:
        expected, found = own.decode(token).float(), lean.decode(token).float()
    except (AttributeError, TypeError, RuntimeError):  # a member of the family that is built otherwise
        return None
    size = float(expected.abs().amax().clamp(min=1.0))
    close = float((found - expected).abs().amax()) <= MAX_DIFFERENCE[torch.is_autocast_enabled(own.device.type)] * size
    return body if close or not bool(torch.isfinite(expected).all()) else None
