"""Keys and values while decoding, each prompt once for all rows that go on from it.

What all prompts begin with stands once for all rows, each prompt once for its group, and own tokens by row; a decode
step reads them as often. Where prompts are short or rows are few, each row has a copy of its prompt instead: then one
attention is faster than several. Rows leave when they are done, and others join.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from grpo.forward.flat_rows import common_header
from grpo.forward.logprobs import Head
from grpo.rollout import Request
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.fast_llama import FastLlama
from grpo.rollout.merge_softmax import Part, merged, part_of
from grpo.rollout.prefill import KeysValues, Prefilled, distinct_prompts, prefill
from grpo.rollout.row_buffer import RowBuffer

T = TypeVar("T")

SHORT_PROMPT = 128  # tokens; such prompts are copied for each row: one attention reads them faster than several
FEW_ROWS = 4  # so few rows, the last ones, get copies of any prompt
NEVER = -1e30  # below every score, and still finite


class SharedCache:
    """Each prompt once, own tokens by row. Travels into the attention as `trees`."""

    joins = True

    def __init__(
        self,
        head: Head,
        requests: Sequence[Request],
        max_new_tokens: int,
        lean: FastLlama | None = None,
        graph: StepGraph | None = None,
    ):
        """requests: all that will join. lean: the body in a form of fewer calls. graph: replays steps."""
        self.head = head
        self.lean = lean
        if lean is not None:
            lean.open()
        self.graph = graph
        self.device = head.model.device
        distinct = list(dict.fromkeys(request.prompt_ids for request in requests))
        self.header = common_header(distinct)
        self.longest = max(map(len, distinct))
        self.limit = self.longest + max_new_tokens
        self.heads: dict[int, KeysValues] = {}  # layer -> keys, values [kvh, Lh, d] of the header
        self.stems: dict[int, KeysValues] = {}  # layer -> keys, values [kvh, P, Lp, d] of prompts after it
        self.own = RowBuffer(max_new_tokens, None if graph is None else self.device)
        self.by_row = False  # whether each row has a copy of its prompt, in front of its own tokens
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.lengths = self.prompt_of = self.asked = self.start = none  # [P]; [B] each
        self.born = np.zeros(0, np.int64)  # [B] the step at which a row began
        self.kind = torch.float32  # of keys and values
        self.biases: dict[int | None, Tensor | None] = {}  # window -> see `_bias`, of the step
        self.placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def join(self, requests: Sequence[Request], last: bool) -> Tensor:
        """Compute each distinct prompt of these rows, which come behind those that are here; logits [b, V].

        last: no others will join.
        """
        self._forget()
        distinct, which = distinct_prompts(requests, self.device)
        made = prefill(self.head, distinct, self.header)
        self.kind = next(iter(made.stems.values()))[0].dtype
        first, count = len(self.prompt_of), len(requests)
        self.prompt_of = torch.cat([self.prompt_of, which + len(self.lengths)])
        self.lengths = torch.cat([self.lengths, made.lengths])
        asked = made.lengths[which]
        self.asked = torch.cat([self.asked, asked])
        self.start = torch.cat([self.start, self.header + asked - self.own.time])
        self.born = np.concatenate([self.born, np.full(count, self.own.time)])
        oldest = int(self.born.min())
        if self.by_row:
            self._join_by_row(made, which, first, count, oldest)
        else:
            self._join_by_prompt(made)
            self.own.join(count, 0, oldest)
        self._choose(last)
        self._place()
        return made.logits[which]

    def _join_by_row(self, made: Prefilled, which: Tensor, first: int, count: int, oldest: int) -> None:
        self.own.join(count, self.header + int(made.lengths.max()), oldest)
        for layer, stem in made.stems.items():
            self.own.copy_prompts(layer, first, made.heads[layer], stem, which)

    def _join_by_prompt(self, made: Prefilled) -> None:
        self.heads = made.heads
        longest = int(self.lengths.max())
        for layer, new in made.stems.items():
            both = (self.stems[layer], new) if layer in self.stems else (new,)
            keys, values = (
                torch.cat([pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts], 1)
                for parts in zip(*both, strict=True)
            )
            self.stems[layer] = (keys, values)

    def _choose(self, last: bool) -> None:
        """Few keys, or few rows where no others will join, are faster read by row."""
        if self.by_row or (self.longest > SHORT_PROMPT and not (last and len(self.prompt_of) <= FEW_ROWS)):
            return
        self.by_row = True
        columns = self.header + int(self.lengths.max())
        self.own.join(0, columns, int(self.born.min()))
        for layer, stem in self.stems.items():
            self.own.copy_prompts(layer, 0, self.heads[layer], stem, self.prompt_of)
        self.stems, self.heads = {}, {}

    def _place(self) -> None:
        """After rows came or went: which columns of a row are its own, and where rows stand gathered by prompt."""
        self.seen = self._own_columns()
        if self.by_row:
            return
        self.born_at = torch.from_numpy(self.born).to(self.device)
        at = torch.arange(int(self.lengths.max()), device=self.device)
        self.before = self.lengths[:, None] - at  # [P, Lp] how far key j lies before its prompt's end; <= 0: padding
        counts = torch.bincount(self.prompt_of, minlength=len(self.lengths))
        order = torch.argsort(self.prompt_of, stable=True)
        slot = torch.empty_like(self.prompt_of)
        slot[order] = torch.arange(len(order), device=self.device) - (counts.cumsum(0) - counts)[self.prompt_of[order]]
        self.slot = slot
        self.slots = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64, device=self.device)
        self.slots[self.prompt_of, slot] = torch.arange(len(slot), device=self.device)  # [P, g] -> row

    def _forget(self) -> None:
        """Before buffers or their rows change, so that the graph's memory is free for what comes."""
        self.biases = {}
        if self.graph is not None:
            self.graph.forget()

    def _own_columns(self) -> Tensor | None:
        """What of the buffer each row sees, as a bias [B, front + room] of 0 and -inf; None: all of it."""
        own = self.own
        padded = self.by_row and bool((self.header + self.asked < own.front).any())
        if not padded and bool((self.born == own.base).all()) and self.graph is None:
            return None
        at = torch.arange(own.front + own.room, device=self.device)
        born = torch.from_numpy(self.born).to(self.device)[:, None] - own.base
        hidden = torch.where(at < own.front, at >= self.header + self.asked[:, None], at - own.front < born)
        return torch.zeros(hidden.shape, dtype=self.kind, device=self.device).masked_fill_(hidden, -torch.inf)

    def keep(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Only these rows go on; prompts that no row needs leave, at the latest when they are half of all.

               last: none will join.
        Returns which row stands where now.
        """
        self._forget()
        order = self.own.keep(rows)
        index = torch.from_numpy(order).to(self.device)
        self.prompt_of, self.asked, self.start = self.prompt_of[index], self.asked[index], self.start[index]
        self.born = self.born[order]
        if not len(order):
            self.lengths, self.stems = self.lengths[:0], {}
            return order
        if not self.by_row:
            used = torch.unique(self.prompt_of)
            if 2 * len(used) <= len(self.lengths) or not last:  # others need the room
                self.lengths = self.lengths[used]
                longest = int(self.lengths.max())
                for layer, (keys, values) in self.stems.items():
                    self.stems[layer] = (keys[:, used, :longest], values[:, used, :longest])
                self.prompt_of = torch.searchsorted(used, self.prompt_of)
            self._choose(last)
        self._place()
        return order

    def decode(self, token_ids: Tensor, then: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; what `then` makes of the logits [B, V] of the one after."""
        if self.own.full:
            self._forget()
            self.own.make_room(int(self.born.min()))
            self.seen = self._own_columns()
        if self.graph is None:
            made = then(self._logits(token_ids))
        else:
            made = self.graph.run(self._logits, then, token_ids, self.by_row)
        self.own.advance()
        return made

    def _logits(self, token_ids: Tensor) -> Tensor:
        """Called again before `advance`, it gives the same again."""
        self.biases = {}
        position_ids = self.start + self.own.now
        if self.lean is not None:
            return self.head.logits(self.lean(token_ids, position_ids, self, self.limit))
        hidden = self.head.body()(
            input_ids=token_ids[:, None],
            position_ids=position_ids[:, None],
            attention_mask=self.placeholder,
            use_cache=False,
            trees=self,
        ).last_hidden_state[:, 0]
        return self.head.logits(hidden)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As forward/shared_attention.py calls it: query [B, H, 1, d], key and value [B, kvh, 1, d] -> [B, 1, H, d]."""
        return self.mix(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scale, window)[:, None]

    def mix(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """One token of each row: query [B, H, d], key and value [B, kvh, d] -> [B, H, d]."""
        query, key, value = query.to(self.kind), key.to(self.kind), value.to(self.kind)
        rows, heads, width = query.shape
        grouped = query.reshape(rows, key.shape[1], -1, width)  # [B, kvh, r, d]
        keys, values = self.own.append(layer, key, value)
        if window is not None and window >= self.limit:
            window = None
        mixed = self._by_row if self.by_row else self._by_prompt
        return mixed(layer, grouped, keys, values, scale, window).reshape(rows, heads, width)

    def _by_row(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of each row to its columns [B, kvh, n, d]."""
        bias = self._bias(window, keys.shape[2])
        if query.device.type != "cpu" or query.dtype != torch.float32:
            mask = None if bias is None else bias[:, None, None].expand(-1, 1, query.shape[2], -1)
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        # One query a row: two products of matrices are faster than torch's attention for the CPU.
        scores = torch.bmm((query * scale).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
        if bias is not None:
            scores.view(len(query), -1, scores.shape[-1]).add_(bias[:, None])
        return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(query.shape)

    def _bias(self, window: int | None, columns: int) -> Tensor | None:
        """What of its first columns each row sees at this step, as a bias [B, columns]; None: all of it."""
        if window not in self.biases:
            self.biases[window] = self._bias_of(window, columns)
        return self.biases[window]

    def _bias_of(self, window: int | None, columns: int) -> Tensor | None:
        seen, own = None if self.seen is None else self.seen[:, :columns], self.own
        if window is None and own.at is None:
            return seen
        at = torch.arange(columns, device=self.device)
        if seen is not None and own.at is not None:
            seen = seen.masked_fill(at > own.at, -torch.inf)  # columns to come
        if window is None:
            return seen
        # Columns of the prompt are positions; own columns end with the one that asks.
        distance = torch.where(at < own.front, (self.start + own.now)[:, None] - at, own.column - at)
        far = torch.zeros(distance.shape, dtype=self.kind, device=self.device).masked_fill_(distance >= window, NEVER)
        return far if seen is None else far + seen

    def _by_prompt(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention to the header, to the prompt, gathered by prompt, and to the row's own tokens, merged."""
        query = query * scale
        own_scores = query @ keys.transpose(-1, -2)  # [B, kvh, r, t]
        bias = self._bias(window, keys.shape[2])
        if bias is not None:
            own_scores += bias[:, None, None]
        own = part_of(own_scores, values)
        stem_keys, stem_values = self.stems[layer]
        gathered = query[self.slots].permute(2, 0, 1, 3, 4)  # [kvh, P, g, r, d]
        kv, prompts, slots, repeats, width = gathered.shape
        gathered = gathered.reshape(kv, prompts, slots * repeats, width)
        scores = gathered @ stem_keys.transpose(-1, -2)  # [kvh, P, g r, Lp]
        if window is None:
            scores.masked_fill_((self.before <= 0)[:, None], NEVER)
        else:
            ahead = (self.own.now - self.born_at)[self.slots]  # [P, g]
            far = self.before[:, None] + ahead[..., None] >= window
            hidden = (far | (self.before <= 0)[:, None]).repeat_interleave(repeats, 1)  # [P, g r, Lp]
            scores.masked_fill_(hidden, NEVER)
        top, total, out = (
            part.view(kv, prompts, slots, repeats, -1)[:, self.prompt_of, self.slot].transpose(0, 1)  # [B, kvh, r, .]
            for part in part_of(scores, stem_values)
        )
        header = [self._header(layer, query, window)] if self.header else []
        return merged([(top, total, out), own, *header]).to(self.kind)

    def _header(self, layer: int, query: Tensor, window: int | None) -> Part:
        """All rows' attention to the header, read once for all of them: [B, kvh, r, .]."""
        keys, values = self.heads[layer]
        rows, kv, repeats, width = query.shape
        scores = query.transpose(0, 1).reshape(kv, rows * repeats, width) @ keys.transpose(-1, -2)  # [kvh, B r, Lh]
        if window is not None:
            at = torch.arange(self.header, device=self.device)
            far = (self.start + self.own.now)[:, None] - at >= window  # [B, Lh]
            scores.masked_fill_(far.repeat_interleave(repeats, 0), NEVER)
        top, total, out = (part.view(kv, rows, repeats, -1).transpose(0, 1) for part in part_of(scores, values))
        return top, total, out
