"""Rollouts: prompts -> completions.

In: the step's `Prompt`s and the policy's weights. Out: this rank's `Completion`s: token ids, the log-prob of every
token, why it stopped. An engine is a file here and its line in training/open_engine.py.

An engine is a class with these methods:

    load_weights(weights, version)       take the policy's tensors, weights() -> (name, tensor)s, once per rollout
    generate(requests, sampling, pulse,  sample one completion for each request, in their order; pass each one to
             on_finished)                on_finished when it is final, while others are still being sampled
    rest()                               nothing more is sampled in this step

`engine.py` is the native engine, on transformers' models; vllm/ asks servers, with these methods too.

The N = P*G rows of a step are cut into chunks of at most `rollout_chunk_rows`, as many for each rank. Ranks take the
next chunk whenever they are free, so that they finish together. What a row samples depends neither on its chunk nor on
the rank that takes it, up to rounding; with `deterministic` the cut is the same for any number of ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from grpo.config.settings import Config
from grpo.rollout.chunks import cut_chunks
from grpo.rollout.sampling import Sampling, sampling_of
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import FittingSize
from grpo.runtime.shares import shares_of
from grpo.types import Completion, Prompt, Pulse

OnFinished = Callable[[list[Completion]], None]
Weights = Callable[[], Iterable[tuple[str, Tensor]]]  # every rank must iterate to the end


@dataclass(frozen=True)
class Request:
    """One completion wanted."""

    row: int  # n of the step
    slot: int  # of the prompt in the run's stream: step*P + p where each step draws P
    generation: int  # g
    prompt_ids: tuple[int, ...]
    num_drawn: int = 0  # tokens of the row drawn by earlier calls: the row's random numbers continue from here


class Engine(Protocol):
    """What samples completions."""

    fitting: FittingSize  # how many rows fit into memory at once, as found when memory ran out
    chunk_rows: int | None  # most rows of one call of `generate`; None: rollout_chunk_rows
    behind: int  # updates between the weights that sampled the last rollout and those that were loaded; 0 but ahead

    def load_weights(self, weights: Weights, version: int) -> None:
        """Take the policy's current weights. version: equal numbers mean equal weights. Every rank must call it."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, pulse: Pulse, *, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        """Sample one completion for each request, in their order; fewer when `pulse` returns True.

        pulse: called once per decode step, or as often as possible; rewards make progress in it. on_finished: called in
        this thread with every completion that is returned, once, in any order, and as early as it is final; an engine
        that does not know may call it at the end. Completions that were cut because `pulse` returned True may be among
        them.
        """

    def rest(self) -> None:
        """Nothing is sampled before the next `load_weights`: give memory back to the update."""


@runtime_checkable
class SamplesAhead(Protocol):
    """What an engine has besides, where it can sample while the caller does something else."""

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Begin to sample these, with the weights that were loaded last; a later `generate` returns them."""


class Listener(Protocol):
    """Who hears of completions while others are still sampled: `Scoring`."""

    grouped: bool
    """Whether one rank has to sample all completions of a prompt."""

    def pulse(self) -> bool:
        """As Engine.generate's."""

    def take(self, completions: list[Completion]) -> None:
        """As Engine.generate's on_finished."""


def requests_of(
    chunk: list[int], prompts: Sequence[Prompt], num_generations: int, slots: Sequence[int]
) -> list[Request]:
    """The requests behind a chunk's rows. slots: of each prompt, a number that is never used twice in a run."""
    places = ((n, *divmod(n, num_generations)) for n in chunk)
    return [Request(n, slots[p], g, prompts[p].token_ids) for n, p, g in places]


def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    slots: Sequence[int],
    cfg: Config,
    world: World,
    listener: Listener | None = None,
    following: tuple[Sequence[Prompt], Sequence[int]] | None = None,
) -> list[Completion]:
    """Sample this rank's part of a step's completions, chunk after chunk, until none is left or a pulse is True.

    slots: of each prompt, what the random numbers of its completions are keyed by: its place in the run's stream.
    following: prompts and slots of the next step, which the engine begins with (rollout_ahead).
    """
    pulse, on_finished = (lambda: False, None) if listener is None else (listener.pulse, listener.take)
    shares, grouped = shares_of(cfg, world.size), listener is not None and listener.grouped
    chunks = cut_chunks(len(prompts), cfg.num_generations, engine.chunk_rows or cfg.rollout_chunk_rows, shares, grouped)
    # what is asked for ahead must be taken by the rank that asked
    dealt = range(world.rank, len(chunks), world.size) if cfg.rollout_ahead else world.deal(len(chunks))
    completions: list[Completion] = []
    for i in dealt:
        requests = requests_of(chunks[i], prompts, cfg.num_generations, slots)
        completions += engine.generate(requests, sampling_of(cfg), pulse, on_finished=on_finished)
        if pulse():
            break
    if following is not None and not pulse():
        coming = [row for i in range(world.rank, len(chunks), world.size) for row in chunks[i]]
        assert isinstance(engine, SamplesAhead)  # as settings are checked
        engine.begin(requests_of(coming, following[0], cfg.num_generations, following[1]), sampling_of(cfg))
    return [c.without_loss() if cfg.truncated == "mask" and c.finish == "length" else c for c in completions]
