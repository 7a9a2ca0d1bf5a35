"""What the engine remembers of B rows while it decodes: the keys and values of their prompts and of their own tokens.

A cache has three methods: `join` computes prompts of rows that begin, `decode` takes each row's next token, `keep` lets
rows leave.
`SharedCache` (shared_cache.py) holds each prompt once; it needs a model whose attention is transformers'
(forward/shared_attention.py). `PlainCache` is transformers' own, a prompt's keys and values repeated for each row; it serves
every other model.
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
from grpo.rollout.fast_llama import FastLlama, fast_llama
from grpo.rollout.prefill import distinct_prompts
from grpo.rollout.shared_cache import SharedCache

T = TypeVar("T")


class PlainCache:
    """Prompts padded on the left to the longest, one column for all rows; transformers' DynamicCache."""

    joins = False  # all rows begin together
    graph = None

    def __init__(self, model: PreTrainedModel, max_new_tokens: int):
        self.model = model
        self.max_new_tokens = max_new_tokens

    def join(self, requests: Sequence[Request], last: bool) -> Tensor:
        """Compute each distinct prompt once; logits [B, V] of the first token."""
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
        """Only these rows go on, in this order."""
        index = torch.from_numpy(rows).to(self.model.device)
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        return rows

    def decode(self, token_ids: Tensor, then: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; what `then` makes of the logits [B, V] of the one after."""
        self.column += 1
        logits = self.model(
            input_ids=token_ids[:, None],
            attention_mask=self.mask[:, : self.column],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.position = self.position + 1
        return then(logits)


def open_cache(
    head: Head,
    shares: bool,
    requests: Sequence[Request],
    max_new_tokens: int,
    lean: FastLlama | None = None,
    graph: StepGraph | None = None,
) -> PlainCache | SharedCache:
    """The cache for a model: shared where its attention can, else transformers' own. requests: all that will join."""
    if shares:
        return SharedCache(head, requests, max_new_tokens, lean, graph)
    return PlainCache(head.model, max_new_tokens)


def checked_fast_llama(head: Head) -> FastLlama | None:
    """The lean body, when it is the model's own forward up to rounding; None where there is none, or it is not."""
    body = fast_llama(head.model, head.body())
    if body is None:
        return None
    requests = [Request(0, 0, 0, tuple(i % head.vocab_size for i in range(5)))]
    own = SharedCache(head, requests, 2)
    token = own.join(requests, last=True).argmax(-1)
    try:
        lean = SharedCache(head, requests, 2, body)
        lean.join(requests, last=True)
        expected, found = own.decode(token, Tensor.float), lean.decode(token, Tensor.float)
    except (AttributeError, TypeError, RuntimeError):  # a member of the family that is built otherwise
        return None
    size = float(expected.abs().amax().clamp(min=1.0))
    close = float((found - expected).abs().amax()) <= MAX_DIFFERENCE[torch.is_autocast_enabled(own.device.type)] * size
    return body if close or not bool(torch.isfinite(expected).all()) else None
