"""Our own engine, on any transformers causal language model, in the training process.

A group's prompt is computed once, and read once a token for all its rows (caches.py); rows that finish leave the
batch; every completion carries the log-prob of each token and, under truncation, the support it was drawn from. With
temperature 0 the tokens are those of `transformers.generate`.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.attention import can_share
from grpo.logprobs import Head
from grpo.models import arithmetic
from grpo.out_of_memory import Room, ran_out
from grpo.rollout import Request
from grpo.rollout.caches import open_cache
from grpo.rollout.randomness import uniforms
from grpo.rollout.sampling import Draw, Sampling, draw
from grpo.rollout.shared_cache import checked_lean
from grpo.types import Completion, Pulse

LEAVE_SHARE = 1 / 8  # finished rows leave once they are this share of the batch: leaving copies the cache


class NativeEngine:
    """Samples with the given model, sharing the trainer's weights where they are the same tensors."""

    def __init__(
        self, model: PreTrainedModel, stop_ids: Iterable[int], max_new_tokens: int, seed: int, dtype: str = "fp32"
    ):
        self.model = model
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.dtype = dtype
        self.head = Head(model, dtype)
        with torch.no_grad(), arithmetic(dtype, model.device):
            self.shares = self.head.usable and can_share(model, self.head.body())
            self.lean = checked_lean(self.head) if self.shares else None
        self.room = Room("rollout", "rollout_chunk_rows", "rows")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the tensors that are not already ours."""
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            if own[name].data_ptr() != tensor.data_ptr():
                own[name].data.copy_(tensor)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        pulse: Pulse = lambda: False,
        on_tokens: Callable[[list[tuple[int, int]]], None] | None = None,
    ) -> list[Completion]:
        """Sample one completion for each request; `on_tokens` sees (sample, token id) pairs as they come.

        When `pulse` says so, the rest is left: completions are cut, and some requests have none. Where memory does
        not suffice, requests are taken in smaller parts. Raises OutOfMemory when even one is too much.
        """
        was_training = self.model.training
        self.model.eval()
        completions: list[Completion] = []
        try:
            while len(completions) < len(requests) and not pulse():
                part = list(requests[len(completions) :])
                part = part[: self.room.part(len(part))]
                try:
                    with arithmetic(self.dtype, self.model.device):
                        completions += self._generate(part, sampling, pulse, on_tokens)
                    self.room.fitted()
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error):
                        raise
                longest = max(len(request.prompt_ids) for request in part)
                shape = f"{len(part)} rows of up to {longest} + {self.max_new_tokens} tokens"
                self.room.halve(len(part), smallest=len(part) == 1, shape=shape)
        finally:
            self.model.train(was_training)
        return completions

    def _generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        pulse: Pulse,
        on_tokens: Callable[[list[tuple[int, int]]], None] | None,
    ) -> list[Completion]:
        cache = open_cache(self.head, self.shares, requests, self.max_new_tokens, self.lean)
        logits = cache.prefill()
        randoms = uniforms(
            self.seed,
            np.array([request.slot for request in requests]),
            np.array([request.generation for request in requests]),
            self.max_new_tokens,
        )
        device_randoms = torch.from_numpy(randoms).to(logits.device)  # [B, max_new]
        rows = torch.arange(len(requests), device=logits.device)  # request behind each row still in the batch
        done = torch.zeros(len(requests), dtype=torch.bool, device=logits.device)
        record = _Record(len(requests), self.max_new_tokens, sampling, logits.device)
        for t in range(self.max_new_tokens):
            drawn = draw(logits, device_randoms[rows, t], sampling)
            stopped = torch.isin(drawn.token_ids, self.stop_ids)
            record.add(t, rows, done, drawn, stopped)
            if on_tokens is not None:
                alive = (~done).tolist()
                pairs = zip(rows.tolist(), drawn.token_ids.tolist(), alive, strict=True)
                on_tokens([(requests[row].sample, token) for row, token, here in pairs if here])
            done = done | stopped | ~drawn.finite
            num_done = int(done.sum())
            if num_done == len(rows) or t + 1 == self.max_new_tokens or pulse():
                break
            token_ids = drawn.token_ids
            if num_done >= max(1, LEAVE_SHARE * len(rows)):
                keep = (~done).nonzero()[:, 0]
                cache.keep(keep)
                rows, done, token_ids = rows[keep], done[keep], token_ids[keep]
            logits = cache.decode(token_ids)
        return record.completions(requests)


class _Record:
    """What was drawn so far, [B, max_new] on the device; read once at the end."""

    def __init__(self, num_rows: int, max_new: int, sampling: Sampling, device: torch.device):
        self.token_ids = torch.zeros(num_rows, max_new, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(num_rows, max_new, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.clamped = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.broken = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.supports: list[Tensor] = []  # one [B, K] int32 per token

    def add(self, t: int, rows: Tensor, done: Tensor, drawn: Draw, stopped: Tensor) -> None:
        """Keep token t of the rows that are not done."""
        alive = ~done & drawn.finite
        here = rows[alive]
        self.token_ids[here, t] = drawn.token_ids[alive].int()
        self.logprobs[here, t] = drawn.logprobs[alive]
        self.lengths[here] = t + 1
        self.clamped[here] += drawn.clamped[alive]
        self.stopped[here] |= stopped[alive]
        self.broken[rows[~done & ~drawn.finite]] = True
        if drawn.support is not None:
            kept = torch.full((len(self.lengths), drawn.support.shape[1]), -1, dtype=torch.int32, device=rows.device)
            kept[here] = drawn.support[alive].int()
            self.supports.append(kept)

    def completions(self, requests: Sequence[Request]) -> list[Completion]:
        """Cut every row to its length."""
        token_ids, logprobs = self.token_ids.cpu().numpy(), self.logprobs.cpu().numpy()
        support = torch.stack(self.supports, 1).cpu().numpy() if self.supports else None  # [B, T, K]
        lengths, clamped = self.lengths.tolist(), self.clamped.tolist()
        flags = zip(self.stopped.tolist(), self.broken.tolist(), strict=True)
        finish = ["error" if broken else "stop" if stopped else "length" for stopped, broken in flags]
        return [
            Completion(
                request.sample,
                token_ids[i, :length].copy(),
                logprobs[i, :length].copy(),
                finish[i],
                None if support is None else support[i, :length].copy(),
                clamped[i],
            )
            for i, (request, length) in enumerate(zip(requests, lengths, strict=True))
        ]
