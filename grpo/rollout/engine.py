"""Our own engine, on any transformers causal language model, in the training process.

A group's prompt is computed once, and read once a token for all its rows (caches.py); rows that finish leave the
batch and others take their place (admission.py); every completion carries the log-prob of each token and, under
truncation, the support it was drawn from. With temperature 0 the tokens are those of `transformers.generate`.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.settings import Config
from grpo.forward.logprobs import Head
from grpo.forward.precision import arithmetic, host_reads_are_free
from grpo.forward.shared_attention import can_share
from grpo.randomness import uniforms
from grpo.rollout import OnFinished, Request
from grpo.rollout.admission import Admission
from grpo.rollout.caches import checked_fast_llama, open_cache
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.drawn_tokens import DrawnTokens
from grpo.rollout.sampling import Draw, Sampling, draw
from grpo.rollout.shared_cache import SHORT_PROMPT
from grpo.runtime.out_of_memory import FittingSize, ran_out
from grpo.types import Completion, Pulse

LEAVE_SHARE = 1 / 32  # finished rows leave once they are this share of the batch
LEAVE_SHARE_GRAPH = 1 / 4  # where each new shape costs a graph
LOOK_STEPS = 8  # between two questions who is done, where they are not free

OnTokens = Callable[[list[tuple[int, int]]], None]


class NativeEngine:
    """Samples with the given model, sharing the trainer's weights where they are the same tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Iterable[int],
        max_new_tokens: int,
        seed: int,
        dtype: str = "fp32",
        max_tokens: int | None = None,
        cuda_graphs: bool = True,
    ):
        """max_tokens: of prompts and completions in the cache at once; None: no limit. cuda_graphs: on CUDA only."""
        self.model = model
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.head = Head(model, dtype)
        with torch.no_grad(), arithmetic(dtype, model.device):
            self.shares = self.head.usable and can_share(model, self.head.body())
            self.lean = checked_fast_llama(self.head) if self.shares else None
        graphs = cuda_graphs and self.shares and model.device.type == "cuda"
        self.graph = StepGraph() if graphs else None
        self.fitting = FittingSize("rollout", "rollout_chunk_rows", "rows")
        self.look_steps = 1 if host_reads_are_free(model.device) else LOOK_STEPS
        self.in_flight: Sequence[Request] = ()

    @classmethod
    def of(cls, cfg: Config, model: PreTrainedModel, stop_ids: Iterable[int]) -> "NativeEngine":
        """The engine that a run's settings ask for."""
        return cls(model, stop_ids, cfg.max_generate_length, cfg.seed, cfg.dtype, cfg.rollout_tokens, cfg.cuda_graphs)

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
        on_tokens: OnTokens | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Sample one completion for each request; `on_tokens` sees (row, token id) pairs as they come.

        `on_finished` gets each completion once, when it is final. When `pulse` says so, the rest is left: completions
        are cut, and some requests have none. Where memory does not suffice, fewer rows decode at once. Raises
        OutOfMemory when even one is too much.
        """
        was_training = self.model.training
        self.model.eval()
        made: dict[int, Completion] = {}  # by row

        def finished(completions: list[Completion]) -> None:
            made.update((completion.row, completion) for completion in completions)
            self.fitting.fitted()
            if on_finished is not None:
                on_finished(completions)

        try:
            while (left := [request for request in requests if request.row not in made]) and not pulse():
                self.in_flight = left[: self.fitting.part(len(left))]
                try:
                    with arithmetic(self.dtype, self.model.device):
                        self._generate(left, sampling, pulse, on_tokens, finished)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error):
                        raise
                if self.graph is not None:
                    self.graph.forget()  # it keeps the cache alive
                tried = self.in_flight
                longest = max(len(request.prompt_ids) for request in tried)
                shape = f"{len(tried)} rows of up to {longest} + {self.max_new_tokens} tokens"
                self.fitting.halve(len(tried), smallest=len(tried) == 1, shape=shape)
        finally:
            self.model.train(was_training)
            if self.graph is not None:
                self.graph.forget()
        return [made[request.row] for request in requests if request.row in made]

    def _generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        pulse: Pulse,
        on_tokens: OnTokens | None,
        finished: OnFinished,
    ) -> None:
        rows = self.fitting.part(len(requests))
        shares = self.shares and max(len(request.prompt_ids) for request in requests) > SHORT_PROMPT  # else a row each
        queue = Admission(requests, self.max_new_tokens, self.max_tokens, rows, shares)
        while queue.waiting and not pulse():  # once, where rows may join; else batch after batch
            waiting = [request for group in queue.waiting for request in group]
            Batch(self, queue, waiting, sampling).run(pulse, on_tokens, finished)


class Batch:
    """The rows that decode together: B of them, some leaving, some joining."""

    def __init__(self, engine: NativeEngine, queue: Admission, requests: list[Request], sampling: Sampling):
        """requests: all that may join."""
        self.engine, self.queue, self.sampling = engine, queue, sampling
        self.max_new = engine.max_new_tokens
        device = engine.model.device
        graph = engine.graph if engine.graph is not None and engine.graph.usable else None
        self.cache = open_cache(engine.head, engine.shares, requests, self.max_new, engine.lean, graph)
        self.record = DrawnTokens(self.max_new, device)
        self.randoms = torch.zeros(0, self.max_new, dtype=torch.float64, device=device)  # [B, max_new]
        self.done = torch.zeros(0, dtype=torch.bool, device=device)  # [B]
        self.ages = np.zeros(0, np.int64)  # [B] tokens of each row
        self.aged = torch.zeros(0, dtype=torch.int64, device=device)  # [B] the same, as a step may read it
        self.leave_share = LEAVE_SHARE if self.cache.graph is None else LEAVE_SHARE_GRAPH

    def run(self, pulse: Pulse, on_tokens: OnTokens | None, finished: OnFinished) -> None:
        """Decode until nobody is left, or `pulse` says stop."""
        engine, record, steps = self.engine, self.record, 0
        first = self._join()
        drawn = None if first is None else self._draw(first)
        while drawn is not None:
            token_ids = drawn.token_ids
            stopped = (token_ids[:, None] == engine.stop_ids).any(-1)
            record.add(drawn, stopped)
            if on_tokens is not None:
                alive = (~self.done).tolist()
                pairs = zip(record.requests, token_ids.tolist(), alive, strict=True)
                on_tokens([(request.row, token) for request, token, here in pairs if here])
            self.done = self.done | stopped | ~drawn.finite
            self.ages += 1
            self.aged += 1
            steps += 1
            old, left = int(self.ages.max()) == self.max_new, False
            if pulse():
                record.file()
                finished(record.completions(np.arange(len(self.ages))))
                return
            if old or steps % engine.look_steps == 0:
                leaving = self.done.cpu().numpy() | (self.ages == self.max_new)
                count = int(leaving.sum())
                if old or count >= max(1, self.leave_share * len(leaving)):
                    order, left = self._leave(leaving, finished), True
                    if not len(order) and not (self.cache.joins and self.queue.waiting):
                        return
                    token_ids = token_ids[torch.from_numpy(order).to(token_ids.device)]
            drawn = self._next(token_ids, left and self.cache.joins and bool(self.queue.waiting))

    def _next(self, token_ids: Tensor, joins: bool) -> Draw:
        """One more token of each row, and the first one of rows that may join now."""
        if not joins:
            return self.cache.decode(token_ids, self._draw)
        parts = [self.cache.decode(token_ids, _as_they_are)] if len(token_ids) else []
        joined = self._join()
        return self._draw(torch.cat(parts if joined is None else [*parts, joined]))

    def _draw(self, logits: Tensor) -> Draw:
        return draw(logits, self._uniforms(), self.sampling)

    def _uniforms(self) -> Tensor:
        """Of each row, the one for its next token, [B]."""
        youngest, oldest = int(self.ages.min()), int(self.ages.max())
        if youngest == oldest and self.cache.graph is None:
            return self.randoms[:, oldest]
        return self.randoms.gather(1, self.aged[:, None])[:, 0]

    def _join(self) -> Tensor | None:
        """Rows begin for which there is room; logits [b, V] of their first tokens. None: there is none."""
        requests = self.queue.admit(self.record.requests)
        if not requests:
            return None
        self.engine.in_flight = [*self.record.requests, *requests]
        logits = self.cache.join(requests, last=not self.queue.waiting)
        self.record.file()
        self.record.join(requests)
        slots, generations = (np.array([getattr(r, name) for r in requests]) for name in ("slot", "generation"))
        randoms = torch.from_numpy(uniforms(self.engine.seed, slots, generations, self.max_new)).to(logits.device)
        self.randoms = torch.cat([self.randoms, randoms])
        self.done = torch.cat([self.done, self.done.new_zeros(len(requests))])
        self.ages = np.concatenate([self.ages, np.zeros(len(requests), np.int64)])
        self.aged = torch.cat([self.aged, self.aged.new_zeros(len(requests))])
        return logits

    def _leave(self, leaving: np.ndarray, finished: OnFinished) -> np.ndarray:
        """Rows that are done go. Returns which row stands where now."""
        self.record.file()
        finished(self.record.completions(np.flatnonzero(leaving)))
        order = self.cache.keep(np.flatnonzero(~leaving), last=not self.queue.waiting)
        self.record.keep(order)
        self.engine.in_flight = self.record.requests or self.engine.in_flight
        index = torch.from_numpy(order).to(self.done.device)
        self.randoms, self.done = self.randoms[index], self.done[index]
        self.ages, self.aged = self.ages[order], self.aged[index]
        return order


def _as_they_are(logits: Tensor) -> Tensor:
    return logits
