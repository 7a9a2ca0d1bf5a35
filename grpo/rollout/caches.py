"""Keys and values of the prompts and own tokens of B rows while the engine decodes them.

A cache has three methods: `join` computes prompts of rows that start, `decode` takes each row's next token, `keep`
drops the other rows. `PlainCache` is the simple path: transformers' own cache, with a prompt's keys and values repeated
for each row; every model can use it. `SharedCache` (shared_cache.py) stores each prompt once; it needs a model whose
attention can share prompts (`can_share` in forward/shared_attention.py).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo.forward.logprobs import Head
from grpo.forward.shared_attention import MAX_DIFFERENCE
from grpo.rollout import Request
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.fast_llama import FastLlama
from grpo.rollout.prefill import distinct_prompts
from grpo.rollout.shared_cache import SharedCache

T = TypeVar("T")


class PlainCache:
    """transformers' DynamicCache: prompts padded on the left to the longest, so that all rows write one column."""

    joins = False  # all rows start together
    graph = None

    def __init__(self, model: PreTrainedModel, max_new_tokens: int):
        self.model = model
        self.max_new_tokens = max_new_tokens

    def join(self, requests: Sequence[Request], last: bool) -> Tensor:
        """Compute each distinct prompt once; logits [B, V] of the first token. Call it once."""
        distinct, rows = distinct_prompts(requests, self.model.device)
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
            input_ids=input_ids,
            attention_mask=mask[:, :longest],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if len(requests) > 1 or len(distinct) > 1:
            self.cache.batch_select_indices(rows)
        self.mask, self.position, self.column = mask[rows], positions[rows, -1] + 1, longest
        return logits[rows]

    def keep(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Keep only these rows, in this order. Returns which row stands where now."""
        index = torch.from_numpy(rows).to(self.model.device)
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        return rows

    def decode(self, token_ids: Tensor, on_logits: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; returns on_logits(logits [B, V] of the token after it)."""
        self.column += 1
        logits = self.model(
            input_ids=token_ids[:, None],
            attention_mask=self.mask[:, : self.column],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.position = self.position + 1
        return on_logits(logits)


def open_cache(
    head: Head,
    shares_prompts: bool,
    requests: Sequence[Request],
    max_new_tokens: int,
    fast_llama: FastLlama | None = None,
    graph: StepGraph | None = None,
) -> PlainCache | SharedCache:
    """requests: all that will join."""
    if shares_prompts:
        return SharedCache(head, requests, max_new_tokens, fast_llama, graph)
    return PlainCache(head.model, max_new_tokens)


def checked_fast_llama(head: Head) -> FastLlama | None:
    """The fast form of the model's body, compared with the model's own forward; None: it has none, or they differ."""
    fast_llama = FastLlama.of(head.model, head.body())
    if fast_llama is None:
        return None
    requests = [Request(0, 0, 0, tuple(i % head.vocab_size for i in range(5)))]
    own = SharedCache(head, requests, 2)
    token = own.join(requests, last=True).argmax(-1)
    try:
        fast = SharedCache(head, requests, 2, fast_llama)
        fast.join(requests, last=True)
        expected, found = own.decode(token, Tensor.float), fast.decode(token, Tensor.float)
    except (AttributeError, TypeError, RuntimeError):  # its modules have other names or shapes
        return None
    size = float(expected.abs().amax().clamp(min=1.0))
    close = float((found - expected).abs().amax()) <= MAX_DIFFERENCE[torch.is_autocast_enabled(own.device.type)] * size
    return fast_llama if close or not bool(torch.isfinite(expected).all()) else None
