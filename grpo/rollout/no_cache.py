"""Decoding without a cache, for models whose forward takes none that follows a whole row's logits."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.forward.arguments import accepted
from grpo.rollout import Request

T = TypeVar("T")


class NoCache:
    """Rows [B, n] whose prompts have one length; each step computes all of their tokens again."""

    joins = False
    graph = None

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def join(self, requests: Sequence[Request], last: bool) -> Tensor:
        """Logits [B, V] of the first token. Call it once."""
        self.tokens = torch.tensor([request.prompt_ids for request in requests], device=self.model.device)
        return self._logits()

    def _logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.tokens, **accepted(self.model, {"use_cache": False})).logits
        return logits[:, -1]

    def keep(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Keep only these rows, in this order. Returns which row stands where now."""
        self.tokens = self.tokens[torch.from_numpy(rows).to(self.model.device)]
        return rows

    def decode(self, token_ids: Tensor, on_logits: Callable[[Tensor], T]) -> T:
        """Take each row's next token [B]; returns on_logits(logits [B, V] of the token after it)."""
        self.tokens = torch.cat([self.tokens, token_ids[:, None]], 1)
        return on_logits(self._logits())
