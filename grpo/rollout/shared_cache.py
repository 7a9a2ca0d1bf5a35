"""Keys and values while decoding, each prompt once for all rows that continue it.

The common prefix of all prompts is stored once, each prompt once for its rows, and own tokens by row; a decode step
reads each of them once. Where prompts are short or rows are few, each row has a copy of its prompt instead: then one
attention is faster than several. Rows leave when they are finished, and others join.

The simple path is `PlainCache` in caches.py; tests compare the two.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from grpo.forward.flat_rows import common_prefix
from grpo.forward.logprobs import Head
from grpo.rollout import Request
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.fast_llama import FastLlama
from grpo.rollout.merge_softmax import Part, merged, part_of
from grpo.rollout.prefill import KeysValues, Prefilled, distinct_prompts, prefill
from grpo.rollout.row_buffer import RowBuffer

T = TypeVar("T")

SHORT_PROMPT = 128  # tokens; a longer prompt is stored once, and read by one attention more
FEW_ROWS = 4  # when the last rows are at most so many, each gets a copy of its prompt, however long
MASKED = -1e30  # below every score, and still finite


class SharedCache:
    """Each prompt once, own tokens by row. Passed to the model as `shared_prompts`."""

    joins = True

    def __init__(
        self,
        head: Head,
        requests: Sequence[Request],
        max_new_tokens: int,
        fast_llama: FastLlama | None = None,
        graph: StepGraph | None = None,
    ):
        """requests: all that will join. fast_llama: used in place of the model's body. graph: replays decode steps."""
        self.head = head
        self.fast_llama = fast_llama
        if fast_llama is not None:
            fast_llama.open()
        self.graph = graph
        self.device = head.model.device
        distinct = list(dict.fromkeys(request.prompt_ids for request in requests))
        self.prefix_length = common_prefix(distinct)
        self.longest = max(map(len, distinct))
        self.limit = self.longest + max_new_tokens  # greater than any position
        self.prefix: dict[int, KeysValues] = {}  # layer -> keys, values [kvh, Lh, d]
        self.prompts: dict[int, KeysValues] = {}  # layer -> keys, values [kvh, P, Lp, d], after the prefix
        self.buffer = RowBuffer(max_new_tokens, None if graph is None else self.device)
        self.by_row = False  # whether each row has a copy of its prompt, before its own tokens in the buffer
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.prompt_lengths = none  # [P], after the prefix
        self.prompt_of = none  # [B] which of the P prompts each row has
        self.row_prompt_lengths = none  # [B], after the prefix
        self.offsets = none  # [B] a row's position id is this plus the buffer's time
        self.start_times = np.zeros(0, np.int64)  # [B] the buffer's time when each row started
        self.dtype = torch.float32  # of keys and values
        self.biases: dict[int | None, Tensor | None] = {}  # window -> `_bias` of the current step
        self.placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def join(self, requests: Sequence[Request], last: bool) -> Tensor:
        """Append rows, and compute each of their distinct prompts once; logits [b, V] of their first tokens.

        last: no others will join.
        """
        self._invalidate()
        distinct, which = distinct_prompts(requests, self.device)
        prefilled = prefill(self.head, distinct, self.prefix_length)
        self.dtype = next(iter(prefilled.prompts.values()))[0].dtype
        # what is kept by prompt and by row
        first, count = len(self.prompt_of), len(requests)
        self.prompt_of = torch.cat([self.prompt_of, which + len(self.prompt_lengths)])
        self.prompt_lengths = torch.cat([self.prompt_lengths, prefilled.lengths])
        lengths = prefilled.lengths[which]
        self.row_prompt_lengths = torch.cat([self.row_prompt_lengths, lengths])
        self.offsets = torch.cat([self.offsets, self.prefix_length + lengths - self.buffer.time])
        self.start_times = np.concatenate([self.start_times, np.full(count, self.buffer.time)])
        # keys and values
        oldest = int(self.start_times.min())
        if self.by_row:
            self._join_by_row(prefilled, which, first, count, oldest)
        else:
            self._join_by_prompt(prefilled)
            self.buffer.join(count, 0, oldest)
        self._copy_prompts_if_faster(last)
        self._update_indices()
        return prefilled.logits[which]

    def _join_by_row(self, prefilled: Prefilled, which: Tensor, first: int, count: int, oldest: int) -> None:
        self.buffer.join(count, self.prefix_length + int(prefilled.lengths.max()), oldest)
        for layer, prompts in prefilled.prompts.items():
            self.buffer.copy_prompts(layer, first, prefilled.prefix[layer], prompts, which)

    def _join_by_prompt(self, prefilled: Prefilled) -> None:
        self.prefix = prefilled.prefix
        longest = int(self.prompt_lengths.max())
        for layer, new in prefilled.prompts.items():
            both = (self.prompts[layer], new) if layer in self.prompts else (new,)
            keys, values = (
                torch.cat([pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts], 1)
                for parts in zip(*both, strict=True)
            )
            self.prompts[layer] = (keys, values)

    def _copy_prompts_if_faster(self, last: bool) -> None:
        """Change to a copy of the prompt by row where prompts are short, or rows are few and no others will join."""
        if self.by_row or (self.longest > SHORT_PROMPT and not (last and len(self.prompt_of) <= FEW_ROWS)):
            return
        self.by_row = True
        columns = self.prefix_length + int(self.prompt_lengths.max())
        self.buffer.join(0, columns, int(self.start_times.min()))
        for layer, prompts in self.prompts.items():
            self.buffer.copy_prompts(layer, 0, self.prefix[layer], prompts, self.prompt_of)
        self.prompts, self.prefix = {}, {}

    def _update_indices(self) -> None:
        """After rows joined or left: which columns each row sees, and where rows stand when gathered by prompt."""
        self.column_bias = self._column_bias()
        if self.by_row:
            return
        self.start_times_on_device = torch.from_numpy(self.start_times).to(self.device)
        places = torch.arange(int(self.prompt_lengths.max()), device=self.device)
        self.to_prompt_end = self.prompt_lengths[:, None] - places  # [P, Lp] distance of key j to it; <= 0: padding
        # rows of a prompt, g at most: the place of each row among them [B], and back [P, g]
        counts = torch.bincount(self.prompt_of, minlength=len(self.prompt_lengths))
        order = torch.argsort(self.prompt_of, stable=True)
        first = (counts.cumsum(0) - counts)[self.prompt_of[order]]
        self.place_in_prompt = torch.empty_like(self.prompt_of)
        self.place_in_prompt[order] = torch.arange(len(order), device=self.device) - first
        self.rows_of_prompt = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64, device=self.device)
        self.rows_of_prompt[self.prompt_of, self.place_in_prompt] = torch.arange(len(order), device=self.device)

    def _invalidate(self) -> None:
        """Call before buffers or their rows change, so that the graph's memory is free for the new ones."""
        self.biases = {}
        if self.graph is not None:
            self.graph.forget()

    def _column_bias(self) -> Tensor | None:
        """A bias of 0 and -inf on the buffer's columns [B, prompt + own columns]; None: each row sees all columns."""
        buffer = self.buffer
        padded = self.by_row and bool((self.prefix_length + self.row_prompt_lengths < buffer.prompt_columns).any())
        if not padded and bool((self.start_times == buffer.base).all()) and self.graph is None:
            return None
        columns = torch.arange(buffer.prompt_columns + buffer.own_columns, device=self.device)
        is_prompt = columns < buffer.prompt_columns
        prompt_end = self.prefix_length + self.row_prompt_lengths[:, None]
        first_own = torch.from_numpy(self.start_times).to(self.device)[:, None] - buffer.base
        hidden = torch.where(is_prompt, columns >= prompt_end, columns - buffer.prompt_columns < first_own)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)

    def keep(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Keep only these rows. Returns which row stands where now.

        Prompts without rows are dropped, once they are half of all or when others will join. last: none will.
        """
        self._invalidate()
        order = self.buffer.keep(rows)
        index = torch.from_numpy(order).to(self.device)
        self.prompt_of, self.offsets = self.prompt_of[index], self.offsets[index]
        self.row_prompt_lengths = self.row_prompt_lengths[index]
        self.start_times = self.start_times[order]
        if not len(order):
            self.prompt_lengths, self.prompts = self.prompt_lengths[:0], {}
            return order
        if not self.by_row:
            used = torch.unique(self.prompt_of)
            if 2 * len(used) <= len(self.prompt_lengths) or not last:
                self.prompt_lengths = self.prompt_lengths[used]
                longest = int(self.prompt_lengths.max())
                for layer, (keys, values) in self.prompts.items():
                    self.prompts[layer] = (keys[:, used, :longest], values[:, used, :longest])
                self.prompt_of = torch.searchsorted(used, self.prompt_of)
            self._copy_prompts_if_faster(last)
        self._update_indices()
        return order

    def decode(self, token_ids: Tensor, on_logits: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; returns on_logits(logits [B, V] of the token after it)."""
        if self.buffer.full:
            self._invalidate()
            self.buffer.grow(int(self.start_times.min()))
            self.column_bias = self._column_bias()
        if self.graph is None:
            result = on_logits(self._logits(token_ids))
        else:
            result = self.graph.run(self._logits, on_logits, token_ids, self.by_row)
        self.buffer.advance()
        return result

    def _logits(self, token_ids: Tensor) -> Tensor:
        """May be called again before `advance`, with the same result."""
        self.biases = {}
        position_ids = self.offsets + self.buffer.step_time
        if self.fast_llama is not None:
            return self.head.logits(self.fast_llama(token_ids, position_ids, self, self.limit))
        hidden = self.head.body()(
            input_ids=token_ids[:, None],
            position_ids=position_ids[:, None],
            attention_mask=self.placeholder,
            use_cache=False,
            shared_prompts=self,
        ).last_hidden_state[:, 0]
        return self.head.logits(hidden)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """For `dispatch`: query [B, H, 1, d], key and value [B, kvh, 1, d] -> [B, 1, H, d]."""
        return self.mix(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scale, window)[:, None]

    def mix(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one token per row: query [B, H, d], key and value [B, kvh, d] -> [B, H, d]."""
        query, key, value = query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)
        rows, heads, width = query.shape  # values may have another width, d' (multi-head latent attention)
        grouped = query.reshape(rows, key.shape[1], -1, width)  # [B, kvh, r, d]
        keys, values = self.buffer.append(layer, key, value)
        if window is not None and window >= self.limit:
            window = None
        attend = self._attend_by_row if self.by_row else self._attend_by_prompt
        return attend(layer, grouped, keys, values, scale, window).reshape(rows, heads, -1)

    def _attend_by_row(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query [B, kvh, r, d], keys and values of the buffer's columns [B, kvh, n, d] -> [B, kvh, r, d]."""
        bias = self._bias(window, keys.shape[2])
        if query.device.type != "cpu" or query.dtype != torch.float32:
            mask = None if bias is None else bias[:, None, None].expand(-1, 1, query.shape[2], -1)
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        # With one query per row, two matrix products are faster than torch's attention on CPU.
        scores = torch.bmm((query * scale).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
        if bias is not None:
            scores.view(len(query), -1, scores.shape[-1]).add_(bias[:, None])
        return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(*query.shape[:-1], -1)

    def _bias(self, window: int | None, columns: int) -> Tensor | None:
        """The bias on the first `columns` columns at this step, [B, columns], the same in all layers; None: no bias."""
        if window not in self.biases:
            self.biases[window] = self._compute_bias(window, columns)
        return self.biases[window]

    def _compute_bias(self, window: int | None, columns: int) -> Tensor | None:
        buffer = self.buffer
        bias = None if self.column_bias is None else self.column_bias[:, :columns]
        if window is None and buffer.column_on_device is None:
            return bias
        places = torch.arange(columns, device=self.device)
        # static buffers: columns that are not written yet
        if bias is not None and buffer.column_on_device is not None:
            bias = bias.masked_fill(places > buffer.column_on_device, -torch.inf)
        if window is None:
            return bias
        # the window: columns of the prompt are positions, own columns end with the current step's
        own_distance = buffer.step_column - places
        prompt_distance = (self.offsets + buffer.step_time)[:, None] - places
        distance = torch.where(places < buffer.prompt_columns, prompt_distance, own_distance)
        too_far = torch.zeros(distance.shape, dtype=self.dtype, device=self.device)
        too_far.masked_fill_(distance >= window, MASKED)
        return too_far if bias is None else too_far + bias

    def _attend_by_prompt(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention to the row's own tokens, to its prompt and to the prefix, each alone, then merged.

        query [B, kvh, r, d], keys and values of own tokens [B, kvh, n, d] -> [B, kvh, r, d].
        """
        # own tokens, by row
        query = query * scale
        own_scores = query @ keys.transpose(-1, -2)  # [B, kvh, r, n]
        bias = self._bias(window, keys.shape[2])
        if bias is not None:
            own_scores += bias[:, None, None]
        own = part_of(own_scores, values)

        # the prompt: queries gathered by prompt, so that its keys are read once for all its rows
        prompt_keys, prompt_values = self.prompts[layer]
        gathered = query[self.rows_of_prompt].permute(2, 0, 1, 3, 4)  # [kvh, P, g, r, d]
        kv, prompts, group, repeats, width = gathered.shape
        gathered = gathered.reshape(kv, prompts, group * repeats, width)
        scores = gathered @ prompt_keys.transpose(-1, -2)  # [kvh, P, g r, Lp]
        padding = self.to_prompt_end <= 0
        if window is None:
            scores.masked_fill_(padding[:, None], MASKED)
        else:
            num_own = (self.buffer.step_time - self.start_times_on_device)[self.rows_of_prompt]  # [P, g]
            too_far = self.to_prompt_end[:, None] + num_own[..., None] >= window
            hidden = (too_far | padding[:, None]).repeat_interleave(repeats, 1)  # [P, g r, Lp]
            scores.masked_fill_(hidden, MASKED)
        # back from prompts to rows, [B, kvh, r, .]
        top, total, out = (
            part.view(kv, prompts, group, repeats, -1)[:, self.prompt_of, self.place_in_prompt].transpose(0, 1)
            for part in part_of(scores, prompt_values)
        )

        # the common prefix, and one softmax over all three
        prefix = [self._attend_to_prefix(layer, query, window)] if self.prefix_length else []
        return merged([(top, total, out), own, *prefix]).to(self.dtype)

    def _attend_to_prefix(self, layer: int, query: Tensor, window: int | None) -> Part:
        """All rows' attention to the prefix, whose keys are read once for all of them: [B, kvh, r, .]."""
        keys, values = self.prefix[layer]
        rows, kv, repeats, width = query.shape
        scores = query.transpose(0, 1).reshape(kv, rows * repeats, width) @ keys.transpose(-1, -2)  # [kvh, B r, Lh]
        if window is not None:
            places = torch.arange(self.prefix_length, device=self.device)
            too_far = (self.offsets + self.buffer.step_time)[:, None] - places >= window  # [B, Lh]
            scores.masked_fill_(too_far.repeat_interleave(repeats, 0), MASKED)
        top, total, out = (part.view(kv, rows, repeats, -1).transpose(0, 1) for part in part_of(scores, values))
        return top, total, out
