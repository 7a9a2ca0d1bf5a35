"""One step ahead (`rollout_ahead: 1`): servers sample the next step while this one is trained.

    step t     collect its completions, load the weights (of update t-1), ask for step t+1, train step t

So the completions of step t+1 are those of weights one step older than what they train. A checkpoint keeps the
completions of the step that follows it, and a run that continues from it trains on these: it goes on as if it had never
been interrupted. Completions that could not be kept, because their server was lost, are sampled anew by the weights of
the checkpoint, with a notice.
"""

import atexit
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from grpo.config.settings import Config, prompts_per_step
from grpo.errors import warn
from grpo.rollout import OnFinished, Request
from grpo.rollout.sampling import sampling_of
from grpo.rollout.vllm.asked import Asked
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping
from grpo.types import Completion, Counters, Extra, Pulse

Key = tuple[int, int]  # slot, g
FINISHES = ("stop", "length", "error")
PER_ROW = 5  # slot, g, why it ended, its tokens, the policy's updates when it was sampled
NAME = "ahead"  # among Policy.extras, and of its file


class Ahead(Extra):
    """This rank's completions that were asked for ahead; a part of checkpoints."""

    def __init__(self, cfg: Config, world: World, num_tokens: int, stopping: Stopping):
        """num_tokens: ids from here on are no tokens."""
        self.cfg, self.world, self.num_tokens, self.stopping = cfg, world, num_tokens, stopping
        self.asked: Asked | None = None  # what servers work on
        self.waiting: dict[Key, int] = {}  # its requests -> row
        self.updates = 0  # of the policy that samples it
        self.kept: dict[Key, tuple[Completion, int]] = {}  # finished; the policy's updates when they were sampled
        self.taken: set[Key] = set()  # of `kept`, for the step that is trained now
        self.lost = 0  # completions that the checkpoint of a resumed run did not hold
        self.behind = 0  # updates between the oldest weights that sampled the step, and those that it trains
        self.gathered: dict[str, Tensor] = {}  # on rank 0
        atexit.register(self._end)  # before a server that this rank started waits for its requests

    def begin(self, asked: Asked, requests: Sequence[Request], updates: int) -> None:
        """Servers sample the next step's requests now, with the weights after so many updates."""
        self._tell_lost()
        self.asked, self.updates = asked, updates
        self.waiting = {(one.slot, one.generation): one.row for one in requests}
        self.kept = {key: self.kept[key] for key in self.taken}  # the step's own, until it is trained: see gather
        self.taken = set()

    def settle(self, pulse: Pulse | None = None, on_finished: OnFinished | None = None) -> None:
        """Wait for what servers work on. A run that was asked to stop waits as long as it has time (Stopping)."""
        if self.asked is None:
            return
        asked, self.asked = self.asked, None
        pulse = pulse or self.stopping.pulse
        completed = asked.collect(lambda: pulse() and not self.stopping.may_wait(), on_finished)
        asked.end()
        if asked.problem is not None:
            self.stopping.fail(asked.problem)
        for key, row in self.waiting.items():
            if row in completed:
                self.kept[key] = completed[row], self.updates

    def _end(self) -> None:
        if self.asked is not None:
            self.asked.end()

    def _tell_lost(self) -> None:
        """A step was trained after the run was resumed."""
        if self.lost and self.world.is_main:
            warn(
                f"{self.lost} completions of the first step were not in the checkpoint: its weights have sampled them."
            )
        self.lost = 0

    def take(
        self, requests: Sequence[Request], updates: int, pulse: Pulse, on_finished: OnFinished | None
    ) -> dict[int, Completion]:
        """Those of the requests that were asked for ahead, by row. updates: of the policy that trains on them."""
        keys = {(one.slot, one.generation): one.row for one in requests}
        told: set[int] = set()

        def tell(completions: list[Completion]) -> None:
            if on_finished is not None:
                on_finished(completions)
                told.update(one.row for one in completions)

        if keys.keys() & self.waiting.keys():
            self.settle(pulse, tell)
        found = {row: self.kept[key] for key, row in keys.items() if key in self.kept}
        completed = {row: replace(one, row=row) for row, (one, _) in found.items()}
        if found:
            self.taken |= {key for key in keys if key in self.kept}
            self.behind = updates - min(sampled for _, sampled in found.values())
            tell([one for row, one in completed.items() if row not in told])
        return completed

    # --- in checkpoints

    def gather(self, counters: Counters) -> None:
        """Bring the completions of the step that follows to rank 0. A collective."""
        self._tell_lost()
        wanted = range(counters.drawn, counters.drawn + prompts_per_step(self.cfg))
        if any(slot in wanted for slot, _ in self.waiting):
            self.settle()
        rows = [(key, *self.kept[key]) for key in sorted(self.kept) if key[0] in wanted]
        completions = [one for _, one, _ in rows]
        facts = [[*key, FINISHES.index(one.finish), len(one.token_ids), updates] for key, one, updates in rows]
        width = sampling_of(self.cfg).support_width
        columns = {
            "rows": np.array(facts, np.int64).reshape(-1, PER_ROW),
            "token_ids": _joined([one.token_ids for one in completions], np.int32),
            "sampler_logprobs": _joined([one.sampler_logprobs for one in completions], np.float32),
        }
        if width:
            columns["support"] = _joined([one.support for one in completions], np.int32, width)
        of_ranks = {name: self._on_main(column) for name, column in columns.items()}
        self.gathered = {name: torch.from_numpy(found) for name, found in of_ranks.items()}

    def _on_main(self, column: np.ndarray) -> np.ndarray:
        """The columns of all ranks in one, on rank 0."""
        words = np.ascontiguousarray(column).view(np.int32).ravel()
        nothing = np.zeros(0, np.int32)
        sizes = self.world.gather_rows(np.array([float(len(words))]))[:, 0].astype(int).tolist()
        outgoing = [words if rank == 0 else nothing for rank in range(self.world.size)]
        arrived = self.world.exchange(outgoing, sizes if self.world.is_main else [0] * self.world.size)
        return np.concatenate(arrived).view(column.dtype).reshape(-1, *column.shape[1:])

    def tensors(self) -> dict[str, Tensor]:
        """What `gather` found, once: [n, 5] rows, and their tokens one after the other."""
        found, self.gathered = self.gathered, {}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The completions of a checkpoint, all ranks' on each. Raises ValueError."""
        width = sampling_of(self.cfg).support_width
        kinds = {"rows": torch.int64, "token_ids": torch.int32, "sampler_logprobs": torch.float32}
        kinds |= {"support": torch.int32} if width else {}
        if {name: tensor.dtype for name, tensor in tensors.items()} != kinds:
            raise ValueError("these are no completions of such a run")
        if not all(tensor.dim() for tensor in tensors.values()):
            raise ValueError("completions have other shapes")
        rows, total = tensors["rows"], len(tensors["token_ids"])
        shapes = {"rows": (len(rows), PER_ROW), "token_ids": (total,), "sampler_logprobs": (total,)}
        shapes |= {"support": (total, width)} if width else {}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes or bool((rows < 0).any()):
            raise ValueError("completions have other shapes")
        lengths = rows[:, 3]
        if int(lengths.sum()) != total or bool((lengths > self.cfg.max_generate_length).any()):
            raise ValueError("completions have other lengths")
        G = self.cfg.num_generations
        if bool((rows[:, 1] >= G).any()) or bool((rows[:, 2] >= len(FINISHES)).any()):
            raise ValueError("completions are of no group")
        slots = {(slot, g) for slot, g, *_ in rows.tolist()}
        if len(slots) < len(rows) or len({slot for slot, _ in slots}) > prompts_per_step(self.cfg):
            raise ValueError("completions are of several steps")
        for name in ("token_ids", *(["support"] if width else [])):
            if not all(-(name == "support") <= int(end) < self.num_tokens for end in _ends(tensors[name])):
                raise ValueError(f"{name} are beyond the vocabulary")
        if width and not bool((tensors["support"] == tensors["token_ids"][:, None]).any(1).all()):
            raise ValueError("tokens are outside of their support")
        if not bool(torch.isfinite(tensors["sampler_logprobs"]).all()):
            raise ValueError("log-probs hold NaN or Inf")
        columns = {name: np.split(tensors[name].numpy(), lengths.cumsum(0)[:-1]) for name in kinds if name != "rows"}
        for i, (slot, g, finish, _, updates) in enumerate(rows.tolist()):
            support = columns["support"][i] if width else None
            ids, logprobs = columns["token_ids"][i], columns["sampler_logprobs"][i]
            one = Completion(g, ids, logprobs, FINISHES[finish], support)
            self.kept[slot, g] = one, updates
        self.lost = prompts_per_step(self.cfg) * G - len(self.kept)


def _joined(parts: Sequence[np.ndarray | None], dtype: type, width: int | None = None) -> np.ndarray:
    empty: np.ndarray = np.zeros((0,) if width is None else (0, width), dtype)
    return np.concatenate([empty, *(part for part in parts if part is not None)])


def _ends(tensor: Tensor) -> list[Tensor]:
    """Its smallest and its largest value."""
    return [tensor.min(), tensor.max()] if tensor.numel() else []
