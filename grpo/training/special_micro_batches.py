"""Micro-batches other than those of the plan.

halves       cut a micro-batch that did not fit into memory in two
even_out     add idle micro-batches, so that every rank has equally many (where a backward is a collective: ZeRO 2, 3)
broken_rows  rows whose logits were not finite, as evidence of a skipped update
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from grpo.runtime.distributed import World
from grpo.training.collate import collate
from grpo.training.minibatches import Minibatch
from grpo.types import Completion, MicroBatch, Prompt, TrainRow


def halves(micro: MicroBatch) -> list[MicroBatch]:
    """Two micro-batches of half the rows each, less padded: the same loss in less memory."""
    middle = (len(micro.rows) + 1) // 2
    return [_rows(micro, slice(0, middle)), _rows(micro, slice(middle, None))]


def _rows(micro: MicroBatch, rows: slice) -> MicroBatch:
    width = max(1, int(micro.lengths[rows].max()))
    length = int(micro.positions[rows].max()) + 1

    def cut(name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return None if name == "flat" else value
        if name == "trained_index":  # computed when needed
            return None
        if name in ("advantages", "lengths"):
            return value[rows]
        return value[rows, : length if name in ("input_ids", "position_ids") else width].contiguous()

    values = {f.name: cut(f.name, getattr(micro, f.name)) for f in dataclasses.fields(micro)}
    return MicroBatch(**{**values, "rows": micro.rows[rows]})  # type: ignore[arg-type]


def even_out(
    mine: list[MicroBatch],
    minibatch: Minibatch,
    num_trained: np.ndarray,
    even_block: int,
    world: World,
    support_width: int = 0,
) -> list[MicroBatch]:
    """Add idle micro-batches and blocks of the head to this rank's, until it has as many as the busiest rank.

    num_trained: [N] tokens of each row that the head computes; even_block: tokens in a block of the head.
    """
    busiest = max(1, *(minibatch.owners.count(rank) for rank in range(world.size)))
    tokens = max((sum(int(num_trained[n]) for n in micro) for micro in minibatch.micro_batches), default=1)
    mine = mine + [idle(support_width, world.device)] * (busiest - len(mine))
    return [dataclasses.replace(micro, head_blocks=math.ceil(tokens / even_block)) for micro in mine]


def idle(support_width: int, device: torch.device) -> MicroBatch:
    """A micro-batch of one token that is not trained: the same collectives as any other, zero gradient."""
    support = np.zeros((1, support_width), np.int32) if support_width else None
    row = TrainRow(-1, (0,), np.zeros(1, np.int32), np.zeros(1, np.float32), support, 0.0)
    micro = collate([row], {-1: 0.0}, device)
    return dataclasses.replace(micro, trained=torch.zeros_like(micro.trained), trained_index=None)


def broken_rows(
    prompts: Sequence[Prompt], completions: Sequence[Completion], num_generations: int, device: torch.device
) -> list[MicroBatch]:
    """The rows whose logits were not finite, one micro-batch each; the last target stands for the missing token."""
    rows = [
        TrainRow(
            c.row,
            prompts[c.row // num_generations].token_ids,
            np.append(c.token_ids, np.int32(0)),
            np.append(c.sampler_logprobs, np.float32(0)),
            None,
            0.0,
        )
        for c in completions
        if c.finish == "error"
    ]
    return [collate([row], {row.row: 0.0}, device) for row in rows]
