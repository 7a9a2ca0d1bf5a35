"""The native engine: any causal language model of transformers, in the training process.

A group's prompt is computed once, and read once per decode step for all its rows (caches.py); finished rows leave the
batch and others take their place (admission.py); every completion has the log-prob of each token and, under truncation,
the support it was drawn from. With temperature 0 the tokens are those of `transformers.generate`.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.forward.logprobs import Head
from grpo.forward.precision import arithmetic, host_reads_are_free
from grpo.forward.shared_attention import can_share
from grpo.randomness import uniforms
from grpo.rollout import OnFinished, Request, Weights
from grpo.rollout.admission import Admission
from grpo.rollout.cache_choice import checked_fast_llama, choose_cache
from grpo.rollout.caches import open_cache, parts
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.drawn_tokens import DrawnTokens
from grpo.rollout.sampling import Draw, Sampling, draw
from grpo.rollout.shared_cache import SHORT_PROMPT
from grpo.rollout.stop_strings import StopStrings
from grpo.runtime.out_of_memory import FittingSize, ran_out
from grpo.types import Completion, Pulse

LEAVE_SHARE = 1 / 32  # finished rows leave once they are this share of the batch
LEAVE_SHARE_GRAPH = 1 / 4  # the same with CUDA graphs, where each new batch shape costs a capture
READ_DONE_STEPS = 8  # steps between two reads of which rows are finished, where a read is a device sync

OnTokens = Callable[[list[tuple[int, int]]], None]


class NativeEngine:
    """Samples with the given model; it may be the trainer's own."""

    chunk_rows: int | None = None
    behind = 0

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Iterable[int],
        max_new_tokens: int,
        seed: int,
        dtype: str = "fp32",
        max_tokens: int | None = None,
        cuda_graphs: bool = True,
        num_tokens: int | None = None,
        stop_strings: StopStrings | None = None,
    ):
        """max_tokens: of prompts and completions in the cache at once; None: no limit. num_tokens: see Head."""
        self.model = model
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
        self.stop_strings = stop_strings
        self.max_new_tokens, self.max_tokens, self.seed, self.dtype = max_new_tokens, max_tokens, seed, dtype
        self.head = Head(model, dtype)
        self.head.num_tokens = num_tokens or self.head.vocab_size
        with torch.no_grad(), arithmetic(dtype, model.device):
            self.cache_kind = choose_cache(self.head, self.head.usable and can_share(model, self.head.body()))
            self.fast_llama = checked_fast_llama(self.head) if self.cache_kind == "shared" else None
        graphs = cuda_graphs and self.cache_kind == "shared" and model.device.type == "cuda"
        self.graph = StepGraph() if graphs else None
        self.fitting = FittingSize("rollout", "rollout_chunk_rows", "rows")
        self.read_done_steps = 1 if host_reads_are_free(model.device) else READ_DONE_STEPS
        self.in_flight: Sequence[Request] = ()  # rows that decode now, named when memory runs out

    @classmethod
    def of(
        cls, cfg: Config, model: PreTrainedModel, stop_ids: Iterable[int], tokens: int, reader: PreTrainedTokenizerBase
    ) -> "NativeEngine":
        """An engine with a run's settings. reader: the tokenizer, which reads the text for stop strings."""
        settings = (cfg.max_generate_length, cfg.seed, cfg.dtype, cfg.rollout_tokens, cfg.cuda_graphs)
        return cls(model, stop_ids, *settings, tokens, StopStrings.of(reader, cfg.stop))

    def load_weights(self, weights: Weights, version: int = 0) -> None:
        """Copy the tensors that this engine's model does not already share."""
        own = dict(self.model.named_parameters())
        for name, tensor in weights():
            if own[name].data_ptr() != tensor.data_ptr():
                own[name].data.copy_(tensor)

    def rest(self) -> None:
        """Between two rollouts it holds no memory of its own."""

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        pulse: Pulse = lambda: False,
        on_tokens: OnTokens | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Sample one completion for each request, in their order.

        on_tokens: called with (row, token id) pairs as they are drawn. on_finished: called once for each completion,
        when it is final. When `pulse` returns True, completions are cut where they are, and requests that have not
        started get none. Where memory does not suffice, fewer rows decode at once; raises OutOfMemory when even one
        does not fit.
        """
        was_training = self.model.training
        self.model.eval()
        completed: dict[int, Completion] = {}  # by row

        def finished(completions: list[Completion]) -> None:
            completed.update((completion.row, completion) for completion in completions)
            self.fitting.fitted()
            if on_finished is not None:
                on_finished(completions)

        try:
            while (open_requests := [r for r in requests if r.row not in completed]) and not pulse():
                self.in_flight = open_requests[: self.fitting.part(len(open_requests))]
                try:
                    with arithmetic(self.dtype, self.model.device):
                        self._generate(open_requests, sampling, pulse, on_tokens, finished)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error):
                        raise
                if self.graph is not None:
                    self.graph.forget()  # it keeps the cache in memory
                tried = self.in_flight
                longest = max(len(request.prompt_ids) for request in tried)
                shape = f"{len(tried)} rows of up to {longest} + {self.max_new_tokens} tokens"
                self.fitting.halve(len(tried), smallest=len(tried) == 1, shape=shape)
        finally:
            self.model.train(was_training)
            if self.graph is not None:
                self.graph.forget()
        return [completed[request.row] for request in requests if request.row in completed]

    def _generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        pulse: Pulse,
        on_tokens: OnTokens | None,
        finished: OnFinished,
    ) -> None:
        rows = self.fitting.part(len(requests))
        # short prompts are copied for each row (shared_cache.py), and so cost memory for each
        shares_prompts = self.cache_kind == "shared" and max(len(r.prompt_ids) for r in requests) > SHORT_PROMPT
        for part in parts(self.cache_kind, requests):
            queue = Admission(part, self.max_new_tokens, self.max_tokens, rows, shares_prompts)
            while queue.waiting and not pulse():  # one batch if rows can join it, else one after another
                waiting = [request for group in queue.waiting for request in group]
                Batch(self, queue, waiting, sampling).run(pulse, on_tokens, finished)


class Batch:
    """The B rows that decode together; finished ones leave, others join.

    The number of tokens of each row is kept twice: `ages` on the host, for decisions, and `ages_on_device`, for the
    decode step. They change in the same three places: a step, a join, a leave.
    """

    def __init__(self, engine: NativeEngine, queue: Admission, requests: list[Request], sampling: Sampling):
        """requests: all that may join."""
        self.engine, self.queue, self.sampling = engine, queue, sampling
        self.max_new, device = engine.max_new_tokens, engine.model.device
        graph = engine.graph if engine.graph is not None and engine.graph.usable else None
        self.cache = open_cache(engine.cache_kind, engine.head, requests, self.max_new, engine.fast_llama, graph)
        self.drawn_tokens = DrawnTokens(self.max_new, device)
        self.randoms = torch.zeros(0, self.max_new, dtype=torch.float64, device=device)  # [B, max_new]
        self.done = torch.zeros(0, dtype=torch.bool, device=device)  # [B]
        self.ages = np.zeros(0, np.int64)  # [B] tokens of each row
        self.ages_on_device = torch.zeros(0, dtype=torch.int64, device=device)  # [B]
        self.leave_share = LEAVE_SHARE if self.cache.graph is None else LEAVE_SHARE_GRAPH

    def run(self, pulse: Pulse, on_tokens: OnTokens | None, finished: OnFinished) -> None:
        """Decode until all rows are finished, or `pulse` returns True."""
        engine, drawn_tokens, steps = self.engine, self.drawn_tokens, 0
        # the first rows join: their prompts, and the first token of each
        first = self._join()
        drawn = None if first is None else self._draw(first)
        while drawn is not None:
            # collect the drawn tokens
            token_ids = drawn.token_ids
            stopped = (token_ids[:, None] == engine.stop_ids).any(-1)
            drawn_tokens.add(drawn, stopped)
            if on_tokens is not None:
                unfinished = (~self.done).tolist()
                triples = zip(drawn_tokens.requests, token_ids.tolist(), unfinished, strict=True)
                on_tokens([(request.row, token) for request, token, streams in triples if streams])
            self.done = self.done | stopped | ~drawn.finite
            self.ages += 1
            self.ages_on_device += 1
            steps += 1
            # a stop: completions are cut here
            if pulse():
                drawn_tokens.flush()
                finished(drawn_tokens.completions(np.arange(len(self.ages))))
                return
            # rows leave when one has reached max_new, or when a read of `done` shows that enough are finished
            at_limit, have_left = int(self.ages.max()) == self.max_new, False
            if at_limit or steps % (1 if on_tokens else engine.read_done_steps) == 0:
                if engine.stop_strings is not None:
                    self.done |= engine.stop_strings.mark(drawn_tokens, self.ages)
                leaving = self.done.cpu().numpy() | (self.ages == self.max_new)
                count = int(leaving.sum())
                if at_limit or count >= max(1, self.leave_share * len(leaving)):
                    order, have_left = self._leave(leaving, finished), True
                    if not len(order) and not (self.cache.joins and self.queue.waiting):
                        return
                    token_ids = token_ids[torch.from_numpy(order).to(token_ids.device)]
            # the next token of each row; other rows may join once some have left
            drawn = self._next(token_ids, have_left and self.cache.joins and bool(self.queue.waiting))

    def _next(self, token_ids: Tensor, may_join: bool) -> Draw:
        """Draw the next token of each row, and the first one of rows that join."""
        if not may_join:
            return self.cache.decode(token_ids, self._draw)
        parts = [self.cache.decode(token_ids, _unchanged)] if len(token_ids) else []
        joined = self._join()
        return self._draw(torch.cat(parts if joined is None else [*parts, joined]))

    def _draw(self, logits: Tensor) -> Draw:
        return draw(logits[:, : self.engine.head.num_tokens], self._uniforms(), self.sampling)

    def _uniforms(self) -> Tensor:
        """[B], the uniform for the next token of each row."""
        youngest, oldest = int(self.ages.min()), int(self.ages.max())
        if youngest == oldest and self.cache.graph is None:
            return self.randoms[:, oldest]
        return self.randoms.gather(1, self.ages_on_device[:, None])[:, 0]

    def _join(self) -> Tensor | None:
        """Start rows that the budget allows; logits [b, V] of their first tokens. None: it allows no more."""
        requests = self.queue.admit(self.drawn_tokens.requests)
        if not requests:
            return None
        self.engine.in_flight = [*self.drawn_tokens.requests, *requests]
        logits = self.cache.join(requests, last=not self.queue.waiting)
        self.drawn_tokens.flush()
        self.drawn_tokens.join(requests)
        slots, generations, num_drawn = np.array([(r.slot, r.generation, r.num_drawn) for r in requests]).T
        randoms = torch.from_numpy(uniforms(self.engine.seed, slots, generations, self.max_new, num_drawn))
        self.randoms = torch.cat([self.randoms, randoms.to(logits.device)])
        self.done = torch.cat([self.done, self.done.new_zeros(len(requests))])
        self.ages = np.concatenate([self.ages, np.zeros(len(requests), np.int64)])
        self.ages_on_device = torch.cat([self.ages_on_device, self.ages_on_device.new_zeros(len(requests))])
        return logits

    def _leave(self, leaving: np.ndarray, finished: OnFinished) -> np.ndarray:
        """Complete the leaving rows and drop them. Returns which row stands where now."""
        self.drawn_tokens.flush()
        finished(self.drawn_tokens.completions(np.flatnonzero(leaving)))
        order = self.cache.keep(np.flatnonzero(~leaving), last=not self.queue.waiting)
        self.drawn_tokens.keep(order)
        self.engine.in_flight = self.drawn_tokens.requests or self.engine.in_flight
        index = torch.from_numpy(order).to(self.done.device)
        self.randoms, self.done = self.randoms[index], self.done[index]
        self.ages, self.ages_on_device = self.ages[order], self.ages_on_device[index]
        return order


def _unchanged(logits: Tensor) -> Tensor:
    return logits
