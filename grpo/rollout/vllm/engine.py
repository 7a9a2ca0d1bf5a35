"""The engine that samples with vLLM: all rows of a step at once, on one or several servers.

Each rank asks for its own rows; a group stays on one server, which computes its prompt once. The uniform that picks a
token is the native engine's, a hash of (seed, slot, g, t), so what a row draws depends neither on its rank nor on its
server, up to rounding. One rank sends the weights to a server (transfer.py), which then samples fixed texts; their
log-probs are compared with the trainer's own. A server that fails ends the run on all ranks, after a checkpoint.
"""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.errors import UserError, warn
from grpo.rollout import OnFinished, Request, Weights
from grpo.rollout.sampling import Sampling, sampling_of
from grpo.rollout.vllm import probes
from grpo.rollout.vllm.ahead import Ahead
from grpo.rollout.vllm.asked import Asked, Form
from grpo.rollout.vllm.client import CONNECTION_ERRORS, Client, ServerProblem, Unusable
from grpo.rollout.vllm.transfer import Broadcaster, Outcome, send_by_http
from grpo.rollout.vllm.wire import DTYPES, vocabulary_of
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import FittingSize
from grpo.runtime.signals import Stopping
from grpo.types import Completion, Pulse

MAX_TRIES = 3  # of a transfer
FP32_PROBE_GAP = 1e-3  # nats, where both sides compute in fp32: there about 1e-6 is usual

Score = Callable[[Sequence[tuple[tuple[int, ...], Completion]], int], list[np.ndarray]]
"""(prompt ids, completion)s, tokens of the rank with most -> [C] log-probs of the trained model.

Called on every rank alike, with rows of its own.
"""


class VllmEngine:
    """See `Engine` in grpo/rollout/__init__.py."""

    chunk_rows: int | None = 2**31  # all of a rank: servers batch them
    behind = 0

    def __init__(
        self,
        cfg: Config,
        world: World,
        clients: Sequence[Client],
        owned: Sequence[Client],
        stop_ids: Iterable[int],
        num_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        score: Score,
        stopping: Stopping,
        dtype: str,
        merged: Weights | None = None,
        in_files: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]] = iter,
    ):
        """clients: those that this rank asks. owned: those that it sends weights to; each server has one such rank.

        num_tokens: ids from here on are never drawn. dtype: that servers compute in. merged: the weights to send in
        place of the policy's trained ones, where these are an adapter's. in_files: gives weights the names and forms
        that they have in a model's files.
        """
        self.merged, self.in_files = merged, in_files
        self.cfg, self.world, self.clients, self.owned = cfg, world, list(clients), list(owned)
        self.most_owned = int(world.gather_rows(np.array([float(len(self.owned))])).max())
        self.stop_ids, self.num_tokens, self.score = sorted(stop_ids), num_tokens, score
        self.fitting = FittingSize("rollout", "rollout_chunk_rows", "rows")
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in probes.TEXTS]
        self.probes = [tuple(ids[: cfg.max_prompt_length or 64]) for ids in texts if ids]
        self.dtype = dtype
        self.gap_limit = gap_limit_of(cfg, dtype)
        self.loaded: int | None = None  # the policy's version that the servers hold
        self.version = ""  # the same, as they know it
        self.loads = 0
        # one name for this process of the run, on every rank
        number = np.array([float(secrets.randbits(48) if world.is_main else 0)])
        self.name = f"{int(world.sum_rows(number)[0]):012x}"
        self.failed = False
        self.send: Callable[[Iterable[tuple[str, Tensor]], str], list[Outcome]]
        if cfg.rollout_transfer == "broadcast":
            others = cfg.rollout_server is not None
            self.send = Broadcaster(self.owned, world.device, others, cfg.rollout_timeout_s).send
        else:
            self.send = partial(send_by_http, self.owned, load_s=cfg.rollout_timeout_s)
        self.stopping = stopping
        self.ahead = Ahead(cfg, world, num_tokens, replace(stopping, fail=self.fail)) if cfg.rollout_ahead else None

    def fail(self, line: str) -> None:
        """Give up: `generate` returns nothing from now on, and the run stops."""
        if not self.failed:
            self.failed = True
            self.stopping.fail(line)

    # --- weights

    def load_weights(self, weights: Weights, version: int) -> None:
        """Send the policy's weights, unless the servers hold this version of them. Every rank must call it."""
        if version == self.loaded:
            return
        if self.ahead is not None:
            self.ahead.settle()  # by the weights that it was asked of
            (ends,) = self.world.any_rank(self.failed or self.stopping.pulse())
            if ends and self.loaded is not None:
                return  # nothing more is sampled: the time is for the checkpoint
        self.loads += 1
        self.loaded, self.version = version, f"{self.name}-{self.loads}"
        for _ in range(MAX_TRIES):
            problem = self._send((self.merged or weights)())
            again, hopeless = self.world.any_rank(problem is not None, isinstance(problem, Unusable))
            if not again or hopeless:
                break
        if problem is not None:
            self.fail(str(problem))
        for place in range(0 if again else self.most_owned):
            self._probe(self.owned[place] if place < len(self.owned) else None)

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> ServerProblem | None:
        """One transfer to the servers of this rank; what went wrong."""
        problem: ServerProblem | None = None
        self._make_room()
        try:
            for client in self.owned:
                client.wait()
        except ServerProblem as error:
            problem = error
        if problem is not None or not self.owned:
            for _ in weights:  # where weights are sharded, gathering them needs every rank
                pass
            return problem
        converted = self.in_files((name, tensor.detach().to(DTYPES[self.dtype])) for name, tensor in weights)
        for client, outcome in zip(self.owned, self.send(converted, self.version), strict=True):
            if isinstance(outcome, ServerProblem):
                return outcome
            if outcome.get("version") != self.version:
                return Unusable(f"{client.url}: answers are malformed (version {str(outcome.get('version'))[:60]}).")
        return None

    def _probe(self, client: Client | None) -> None:
        """Compare the log-probs of a server with the trainer's, on fixed texts.

        client: None on a rank that owns fewer; it scores something too: a collective where weights are sharded.
        """
        sampling = sampling_of(self.cfg)
        support = np.full((1, sampling.support_width), -1, np.int32) if sampling.support_width else None
        nothing = Completion(0, np.zeros(1, np.int32), np.zeros(1, np.float32), "length", support)
        answers: list[Completion] = []
        copies = 1 if client is None else client.copies
        if client is not None and not self.failed:
            requests = probes.requests_of(self.probes, copies)
            form = replace(self._form(sampling), limit=probes.TOKENS, stop_ids=[], stop=[], each_copy=True)
            answers = list(self._collected(Asked(form, [(client, dict(enumerate(requests)))])).values())
        texts = [self.probes[one.row // copies] for one in answers]
        whole = [one if len(one.token_ids) else nothing for one in answers]
        asked = [*zip(texts, whole, strict=True)] or [(self.probes[0], nothing)]
        tokens = np.array([float(sum(len(one.token_ids) for _, one in asked))])
        scored = self.score(asked, int(self.world.gather_rows(tokens).max()))
        if client is None or self.failed:
            return
        found, limit = probes.compare(answers, scored, copies), self.gap_limit
        if self.cfg.max_sampler_gap is None and (self.cfg.dtype, self.dtype) == ("fp32", "float32"):
            limit = FP32_PROBE_GAP
        if not found.gap <= limit:
            self.fail(
                f"{client.url}: every tensor arrived as it was sent, but on fixed texts its log-probs differ from the "
                f"trainer's: {found.words}; {limit:g} nats are allowed (max_sampler_gap). It computes something else: "
                "compare its --model (rope, architecture), --dtype and quantisation with this run's."
            )

    def _make_room(self) -> None:
        """Give memory back to the device before a server that slept on it takes its own."""
        if self.world.device.type == "cuda" and any(client.sleeps for client in self.owned):
            torch.cuda.empty_cache()

    def rest(self) -> None:
        """See `Engine`: servers that can (--enable-sleep-mode) sleep until they are asked again."""
        for client in self.owned if self.ahead is None and not self.failed else ():
            if client.sleeps:
                try:
                    client.sleep()
                except (ServerProblem, *CONNECTION_ERRORS) as error:
                    warn(f"warning: {client.url}: it keeps its memory during the update ({error})")

    # --- completions

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        pulse: Pulse = lambda: False,
        *,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """As `Engine.generate`. Completions that `pulse` interrupts are dropped."""
        completed: dict[int, Completion] = {}
        if self.ahead is not None:
            assert self.loaded is not None
            completed = self.ahead.take(requests, self.loaded, pulse, on_finished)
            self.behind = self.ahead.behind
        missing = [request for request in requests if request.row not in completed]
        if missing and not self.failed:
            self._make_room()
            asked = self._ask(missing, self._form(sampling))
            completed |= self._collected(asked, pulse, on_finished)
        return [completed[request.row] for request in requests if request.row in completed]

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """See `SamplesAhead`."""
        assert self.ahead is not None and self.loaded is not None
        if not self.failed:
            self.ahead.begin(self._ask(requests, self._form(sampling)), requests, self.loaded)

    def _form(self, sampling: Sampling) -> Form:
        """Of a step's or an evaluation's requests."""
        limit, timeout_s = self.cfg.max_generate_length, self.cfg.rollout_timeout_s
        common = (self.version, self.cfg.seed, sampling, limit, self.num_tokens)
        return Form(*common, self.stop_ids, self.cfg.stop, timeout_s)

    def _ask(self, requests: Sequence[Request], form: Form) -> Asked:
        """Send the requests, a group to one server."""
        shares: list[dict[int, Request]] = [{} for _ in self.clients]
        for key, request in enumerate(requests):
            shares[request.slot % len(self.clients)][key] = request
        return Asked(form, [each for each in zip(self.clients, shares, strict=True) if each[1]])

    def _collected(
        self, asked: Asked, pulse: Pulse = lambda: False, on_finished: OnFinished | None = None
    ) -> dict[int, Completion]:
        """The completions, by row; what `pulse` interrupts is dropped."""
        completed = asked.collect(pulse, on_finished)
        asked.end()
        if asked.problem is not None:
            self.fail(asked.problem)
        return completed


def gap_limit_of(cfg: Config, served: str) -> float:
    """Largest mean |sampler - trainer| log-prob of rollout servers, which compute in the dtype `served`, in nats."""
    both_fp32 = (cfg.dtype, served) == ("fp32", "float32")
    return (0.02 if both_fp32 else 0.1) if cfg.max_sampler_gap is None else cfg.max_sampler_gap


def check_facts(facts: dict[str, Any], url: str, cfg: Config, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare a server's model with the trained one. config: of the trained model. Raises UserError."""
    text = config.get_text_config()
    own = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    own["architecture"] = next(iter(config.architectures or [None]))
    for name, value in own.items():
        if value is not None and facts.get(name) != value:
            raise UserError(
                f"rollout_server: {url} serves {str(facts.get('model'))[:100]!r} with {name} "
                f"{str(facts.get(name))[:60]}, the trained model has {value}. Start it with --model {cfg.model}."
            )
    needed = (cfg.max_prompt_length or 0) + cfg.max_generate_length
    if facts.get("max_model_len", 0) < needed:
        raise UserError(
            f"rollout_server: {url} takes {facts.get('max_model_len')} tokens, max_prompt_length + max_generate_length "
            f"are {needed}. Start it with --max-model-len {needed}."
        )
    if cfg.stop and facts.get("vocabulary") != vocabulary_of(tokenizer):
        raise UserError(
            f"stop: {url} has another tokenizer, so it would find other stop strings. Start it with --tokenizer "
            f"{cfg.model}."
        )
    if facts.get("dtype") not in DTYPES:
        raise UserError(
            f"rollout_server: {url} computes in {facts.get('dtype')}. Start it with --dtype bfloat16 or float32."
        )
