"""Micro-batches other than those of the plan.

halves       a micro-batch that did not fit into memory, cut in two
even_out     as many on every rank, where a backward is a collective (ZeRO 2 and 3): idle ones are added
broken_rows  rows whose logits were not finite, kept as evidence
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
    """Two micro-batches of half the rows each, cut to their own longest: the same loss, in less memory."""
    middle = (len(micro.rows) + 1) // 2
    return [_rows(micro, slice(0, middle)), _rows(micro, slice(middle, None))]


def _rows(micro: MicroBatch, rows: slice) -> MicroBatch:
    width = max(1, int(micro.lengths[rows].max()))
    length = int(micro.positions[rows].max()) + 1

    def cut(name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return None if name == "flat" else value
        if name == "kept":
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
    support: int = 0,
) -> list[MicroBatch]:
    """This rank's micro-batches, brought up to as many, with as many blocks of the head, as the busiest rank has.

    num_trained: [N] tokens of each row that meet the head; even_block: tokens in a block of the head.
    """
    busiest = max(1, *(minibatch.owners.count(rank) for rank in range(world.size)))
    tokens = max((sum(int(num_trained[n]) for n in micro) for micro in minibatch.micro_batches), default=1)
    mine = mine + [idle(support, world.device)] * (busiest - len(mine))
    return [dataclasses.replace(micro, head_blocks=math.ceil(tokens / even_block)) for micro in mine]


def idle(support_width: int, device: torch.device) -> MicroBatch:
    """A micro-batch without a token that counts: the same collectives as a real one, a gradient of zero."""
    support = np.zeros((1, support_width), np.int32) if support_width else None
    row = TrainRow(-1, (0,), np.zeros(1, np.int32), np.zeros(1, np.float32), support, 0.0)
    micro = collate([row], {-1: 0.0}, device)
    return dataclasses.replace(micro, trained=torch.zeros_like(micro.trained), kept=None)


def broken_rows(
    prompts: Sequence[Prompt], completions: Sequence[Completion], num_generations: int, device: torch.device
) -> list[MicroBatch]:
    """The rows whose logits were not finite, one micro-batch each; the last target stands for the token that failed."""
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
