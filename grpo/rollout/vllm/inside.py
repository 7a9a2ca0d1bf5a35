"""What runs inside vLLM's processes: the draw of grpo/rollout/sampling.py, and new weights.

vLLM computes logits; the token is drawn here, by the code and the keyed random numbers of the native engine. So every
setting of sampling means the same on both engines, equal logits give equal tokens, and neither the batch nor a request
that is asked again changes what a row draws. The drawn token is handed to vLLM's sampler as the only one possible:

    logits of a row  ->  the drawn token: its log-prob;  other ids of its support: IN_SUPPORT;  all others: -inf

and comes back as "logprobs", because the server runs with logprobs_mode processed_logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from grpo.randomness import uniforms
from grpo.rollout.sampling import Sampling, draw
from grpo.rollout.vllm.broadcast import Group, Place
from grpo.rollout.vllm.wire import DRAW, IN_SUPPORT, NOT_FINITE, describe, index_of, read_frames

Row = tuple[list[Any], Sequence[int]]  # arguments of the draw; the tokens drawn so far, a list that vLLM extends


class KeyedDraw(LogitsProcessor):
    """Draws every row's token. Arguments: extra_args[DRAW] = [seed, slot, g, first token, ids, *fields of Sampling]."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: so it runs first, and for every row."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows that leave, join and move."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, drawn in batch_update.added:
            self._set(index, _row_of(params, drawn))
        for start, end, direction in batch_update.moved:
            moved, replaced = self.rows.pop(start, None), self.rows.pop(end, None)
            self._set(end, moved)
            if direction == MoveDirectionality.SWAP:
                self._set(start, replaced)

    def _set(self, index: int, row: Row | None) -> None:
        if row is None:
            self.rows.pop(index, None)
        else:
            self.rows[index] = row

    def apply(self, logits: Tensor) -> Tensor:
        """Replace logits [B, V] of the rows that have arguments."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, (arguments, _) in self.rows.items():
            if index < len(logits):
                kinds.setdefault((arguments[0], *arguments[4:]), []).append(index)
        for (seed, num_tokens, *settings), indices in kinds.items():
            slots, generations, firsts = np.array([self.rows[i][0][1:4] for i in indices], dtype=np.uint64).T
            ages = firsts + np.array([len(self.rows[i][1]) for i in indices], dtype=np.uint64)
            numbers = uniforms(seed, slots, generations, 1, ages)[:, 0]
            chosen = torch.tensor(indices, device=logits.device)
            sampling = Sampling(*settings)
            given = logits[chosen, :num_tokens]
            drawn = draw(given, torch.from_numpy(numbers).to(logits.device), sampling)
            result = logits.new_full((len(indices), logits.shape[1] + 1), -torch.inf)  # the last column: padding
            if drawn.support is not None:
                result.scatter_(1, torch.where(drawn.support < 0, logits.shape[1], drawn.support), IN_SUPPORT)
            logprobs = torch.where(drawn.finite, drawn.logprobs, NOT_FINITE).to(result.dtype)
            result.scatter_(1, drawn.token_ids[:, None], logprobs[:, None])
            logits[chosen] = result[:, :-1]
        return logits


def _row_of(params: SamplingParams, drawn: Sequence[int]) -> Row | None:
    given = (params.extra_args or {}).get(DRAW)
    if given is None:
        return None
    assert len(given) == 5 + len(fields(Sampling))
    return list(given), drawn


def _repack(model: torch.nn.Module) -> None:
    """Pack again what vLLM's reload leaves as it was, or unpacked: on CPU it computes with packed copies of weights.

    Heads that share their weight with the embedding are not loaded, and so keep their old copy; experts are loaded, and
    then read as if they were packed.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and current_platform.is_cpu():
            kernel.fused_experts.process_weights_after_loading(module)


def _until_broken(tensors: Iterator[tuple[str, Tensor]], broken: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that come. vLLM's reload has to come to its end: the next one would fail after an exception in it."""
    try:
        yield from tensors
    except Exception as error:
        broken.append(describe(error))


class WeightReceiver:
    """Methods that vLLM adds to its workers (worker_extension_cls).

    They return what went wrong, and None when nothing did. With several workers vLLM raises the first error and keeps
    the answers of the others, which it then takes for those of the next call.
    """

    trainer_group: Group | None = None

    def receive_weights(self, file: str) -> str | None:
        """Load the weights of a stored stream in place."""
        path, changed = Path(file), list[str]()
        try:
            return self._load(read_frames(path, index_of(path), changed), changed)  # complete, before any changes
        except Exception as error:
            return describe(error)

    def join_group(self, place: dict[str, Any]) -> str | None:
        """Enter the process group of a trainer, in place of an earlier one."""
        try:
            self.leave_group()
            self.trainer_group = Group.join(Place(**place), self.device)  # type: ignore[attr-defined]
            return None
        except Exception as error:
            return describe(error)

    def leave_group(self) -> None:
        """Forget the group."""
        group, self.trainer_group = self.trainer_group, None
        if group is not None:
            group.close()

    def receive_broadcast(self, number: int) -> str | None:
        """Load the weights that the group's trainer broadcasts."""
        if self.trainer_group is None:
            return "this process is in no group"
        tensors = self.trainer_group.receive(number, changed := list[str]())
        problem = self._load(tensors, changed)
        if problem is not None:
            with suppress(Exception):
                for _ in tensors:  # the others of the group do not wait for this one
                    pass
            self.leave_group()
        return problem

    def _load(self, tensors: Iterator[tuple[str, Tensor]], changed: list[str]) -> str | None:
        """changed: names of tensors that arrived changed, known when all have been read."""
        broken: list[str] = []
        try:
            self.model_runner.reload_weights(weights_iterator=_until_broken(tensors, broken))  # type: ignore[attr-defined]
            _repack(self.model_runner.get_model())  # type: ignore[attr-defined]
        except Exception as error:
            broken.append(describe(error))
        if changed:
            return f"the weight {changed[0][:200]} arrived changed"
        return broken[0] if broken else None
