"""Keys, values and states of the prompts and own tokens of B rows while the engine decodes them.

A cache has three methods: `join` computes prompts of rows that start, `decode` takes each row's next token, `keep`
drops the other rows. Four kinds, from the fastest to the simplest; cache_choice.py tries which a model can use:

    shared          SharedCache (shared_cache.py): each prompt stored once; needs attention that can share prompts
    padded          transformers' own cache; prompts padded on the left
    equal_lengths   the same without padding: rows whose prompts have one length decode together
    recompute       no cache: each token computes its whole row again, rows of one prompt length together
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo.forward.arguments import accepted, takes
from grpo.forward.logprobs import Head
from grpo.rollout import Request
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.fast_llama import FastLlama
from grpo.rollout.no_cache import NoCache
from grpo.rollout.prefill import distinct_prompts
from grpo.rollout.shared_cache import SharedCache

T = TypeVar("T")
CacheKind = Literal["shared", "padded", "equal_lengths", "recompute"]
CACHE_NAMES = ("past_key_values", "cache_params")  # of the argument and of the output


class PlainCache:
    """transformers' DynamicCache: all rows write one column, or update their states in place."""

    joins = False  # all rows start together
    graph = None

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, padded: bool = True):
        """padded: prompts of different lengths are padded on the left; False: prompts have one length."""
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.padded = padded
        self.cache_name = next((name for name in CACHE_NAMES if takes(model, name)), "")
        if not self.cache_name:
            raise NotImplementedError("its forward takes no cache")

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
        self.cache = self._empty_cache()
        logits = self._forward(input_ids, positions, mask[:, :longest], logits_to_keep=1)
        if len(requests) > 1 or len(distinct) > 1:
            self.cache.reorder_cache(rows)
        self.mask, self.position, self.column = mask[rows], positions[rows, -1] + 1, longest
        return logits[rows]

    def _empty_cache(self) -> Any:
        """None for a model that makes a cache of its own class."""
        model: Any = self.model
        return DynamicCache(config=model.config) if model._supports_default_dynamic_cache() else None

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor, **others: Any) -> Tensor:
        """Logits [B, V] after the last of the tokens [B, n]; they enter the cache."""
        arguments = {"position_ids": positions, "attention_mask": mask if self.padded else None, "use_cache": True}
        outputs = self.model(
            input_ids=input_ids, **accepted(self.model, arguments | others), **{self.cache_name: self.cache}
        )
        if self.cache is None:
            self.cache = getattr(outputs, self.cache_name)
        return outputs.logits[:, -1]

    def keep(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Keep only these rows, in this order. Returns which row stands where now."""
        index = torch.from_numpy(rows).to(self.model.device)
        self.cache.reorder_cache(index)
        self.mask, self.position = self.mask[index], self.position[index]
        return rows

    def decode(self, token_ids: Tensor, on_logits: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; returns on_logits(logits [B, V] of the token after it)."""
        self.column += 1
        logits = self._forward(token_ids[:, None], self.position[:, None], self.mask[:, : self.column])
        self.position = self.position + 1
        return on_logits(logits)


def open_cache(
    kind: CacheKind,
    head: Head,
    requests: Sequence[Request],
    max_new_tokens: int,
    fast_llama: FastLlama | None = None,
    graph: StepGraph | None = None,
) -> PlainCache | SharedCache | NoCache:
    """requests: all that will join."""
    if kind == "shared":
        return SharedCache(head, requests, max_new_tokens, fast_llama, graph)
    if kind == "recompute":
        return NoCache(head.model)
    return PlainCache(head.model, max_new_tokens, padded=kind == "padded")


def parts(kind: CacheKind, requests: Sequence[Request]) -> list[list[Request]]:
    """The requests that may decode together: all, or those whose prompts have one length."""
    if kind in ("shared", "padded"):
        return [list(requests)]
    by_length = sorted(requests, key=lambda request: len(request.prompt_ids))
    return [list(part) for _, part in groupby(by_length, key=lambda request: len(request.prompt_ids))]
