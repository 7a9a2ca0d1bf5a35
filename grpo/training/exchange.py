"""From a plan and completions to micro-batches: the exchange that brings rows to who trains on them, and padding."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from grpo.config.settings import Config
from grpo.forward.flat_rows import flatten
from grpo.rollout.sampling import sampling_of
from grpo.runtime.distributed import World
from grpo.training.losses import row_weights
from grpo.training.minibatches import Minibatch, trainers_of
from grpo.types import Completion, MicroBatch, Prompt, Table, TrainRow


def exchange(
    world: World,
    completions: Sequence[Completion],
    lengths: np.ndarray,
    sampled_by: np.ndarray,
    trainers: dict[int, int],
    support_width: int,
) -> dict[int, Completion]:
    """Bring every row to the rank that trains on it: ids, log-probs and support, each once.

    lengths: [N] completion tokens of each row; sampled_by: the rank that sampled it.
    """
    mine = {completion.row: completion for completion in completions}
    if world.size == 1:
        return {row: mine[row] for row in trainers}
    size = lambda row: int(lengths[row]) * (2 + support_width)  # noqa: E731  int32 words of one row
    outgoing = []
    for rank in range(world.size):
        parts = [_pack(mine[n]) for n in sorted(trainers) if trainers[n] == rank and sampled_by[n] == world.rank]
        outgoing.append(np.concatenate([np.zeros(0, np.int32), *parts]))
    wanted = [
        [n for n in sorted(trainers) if trainers[n] == world.rank and sampled_by[n] == rank]
        for rank in range(world.size)
    ]
    incoming = world.exchange(outgoing, [sum(map(size, rows)) for rows in wanted])
    received: dict[int, Completion] = {}
    for rows, words in zip(wanted, incoming, strict=True):
        ends = np.cumsum([size(n) for n in rows])
        for row, end in zip(rows, ends, strict=True):
            received[row] = _unpack(row, words[end - size(row) : end], int(lengths[row]), support_width)
    return received


def _pack(completion: Completion) -> np.ndarray:
    parts = [completion.token_ids, completion.sampler_logprobs.view(np.int32)]
    if completion.support is not None:
        parts.append(completion.support.ravel())
    return np.concatenate(parts).astype(np.int32)


def _unpack(row: int, words: np.ndarray, length: int, support_width: int) -> Completion:
    token_ids, logprobs, support = words[:length], words[length : 2 * length], words[2 * length :]
    return Completion(
        row,
        token_ids.copy(),
        logprobs.copy().view(np.float32),
        finish="",
        support=support.reshape(length, support_width).copy() if support_width else None,
    )


def collate(rows: Sequence[TrainRow], weights: dict[int, float], device: torch.device) -> MicroBatch:
    """Pad rows on the right into one micro-batch; the one place where predictions meet their targets.

    Token t of a completion is predicted at position len(prompt) - 1 + t.
    """
    num_rows = len(rows)
    longest = max(len(row.prompt_ids) + len(row.token_ids) - 1 for row in rows)  # the last token predicts nothing
    width = max(len(row.token_ids) for row in rows)
    input_ids = np.zeros((num_rows, longest), np.int64)
    positions, target_ids = np.zeros((num_rows, width), np.int64), np.zeros((num_rows, width), np.int64)
    logprobs, token_weights = np.zeros((num_rows, width), np.float32), np.zeros((num_rows, width), np.float32)
    mask = np.zeros((num_rows, width), bool)
    kept = rows[0].support
    support = None if kept is None else np.full((num_rows, width, kept.shape[1]), -1, np.int64)
    for b, row in enumerate(rows):
        prompt, length = len(row.prompt_ids), len(row.token_ids)
        input_ids[b, : prompt + length - 1] = [*row.prompt_ids, *row.token_ids[:-1].tolist()]
        positions[b, :length] = np.arange(prompt - 1, prompt - 1 + length)
        target_ids[b, :length] = row.token_ids
        mask[b, :length] = True
        logprobs[b, :length] = row.sampler_logprobs
        token_weights[b, :length] = weights[row.row]
        if support is not None and row.support is not None:
            support[b, :length] = row.support
    to = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return MicroBatch(
        rows=tuple(row.row for row in rows),
        input_ids=to(input_ids),
        positions=to(positions),
        target_ids=to(target_ids),
        mask=to(mask),
        advantages=to(np.array([row.advantage for row in rows], np.float32)),
        sampler_logprobs=to(logprobs),
        support=None if support is None else to(support),
        weights=to(token_weights),
        flat=flatten(input_ids, positions, mask.sum(-1).clip(min=1), device),
        kept=to(np.flatnonzero(mask)),
    )


def halves(micro: MicroBatch) -> list[MicroBatch]:
    """Two micro-batches of half the rows each, cut to their own longest: the same loss, in less memory."""
    middle = (len(micro.rows) + 1) // 2
    return [_rows(micro, slice(0, middle)), _rows(micro, slice(middle, None))]


def _rows(micro: MicroBatch, rows: slice) -> MicroBatch:
    width = max(1, int(micro.mask[rows].sum(-1).max()))
    length = int(micro.positions[rows].max()) + 1

    def cut(name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return None if name == "flat" else value
        if name == "kept":
            return None
        if name == "advantages":
            return value[rows]
        return value[rows, : length if name in ("input_ids", "position_ids") else width].contiguous()

    values = {f.name: cut(f.name, getattr(micro, f.name)) for f in dataclasses.fields(micro)}
    return MicroBatch(**{**values, "rows": micro.rows[rows]})  # type: ignore[arg-type]


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


def deliver(
    world: World,
    cfg: Config,
    plan: Sequence[Minibatch],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    table: Table,
    advantages: np.ndarray,
    even_block: int = 0,
) -> list[list[MicroBatch]]:
    """Bring this rank the micro-batches it trains on, minibatch by minibatch, weights already divided.

    advantages: [N], of all rows. even_block: 0, or tokens in a block of the head, when every rank must run as many
    micro-batches and blocks as the busiest one (backends that shard weights).
    """
    lengths = table.lengths
    support = sampling_of(cfg).support_width
    rows = exchange(world, completions, lengths, table.sampled_by, trainers_of(plan), support)
    batches = []
    for minibatch in plan:
        weights = row_weights(cfg.loss, [int(lengths[n]) for n in minibatch.rows], cfg.max_generate_length)
        weight_of = dict(zip(minibatch.rows, weights, strict=True))
        mine = []
        for micro in minibatch.of_rank(world.rank):
            train_rows = [
                TrainRow(
                    n,
                    prompts[n // cfg.num_generations].token_ids,
                    rows[n].token_ids,
                    rows[n].sampler_logprobs,
                    rows[n].support,
                    float(advantages[n]),
                )
                for n in micro
            ]
            mine.append(collate(train_rows, weight_of, world.device))
        batches.append(even_out(mine, minibatch, lengths, even_block, world, support) if even_block else mine)
    return batches


def even_out(
    mine: list[MicroBatch], minibatch: Minibatch, lengths: np.ndarray, even_block: int, world: World, support: int = 0
) -> list[MicroBatch]:
    """This rank's micro-batches, brought up to as many, with as many blocks of the head, as the busiest rank has.

    lengths: tokens that count in each row of the minibatch; even_block: tokens in a block of the head.
    """
    busiest = max(1, *(minibatch.owners.count(rank) for rank in range(world.size)))
    tokens = max((sum(int(lengths[n]) for n in micro) for micro in minibatch.micro_batches), default=1)
    mine = mine + [idle(support, world.device)] * (busiest - len(mine))
    return [dataclasses.replace(micro, head_blocks=math.ceil(tokens / even_block)) for micro in mine]


def idle(support_width: int, device: torch.device) -> MicroBatch:
    """A micro-batch without a token that counts: the same collectives as a real one, a gradient of zero."""
    support = np.zeros((1, support_width), np.int32) if support_width else None
    row = TrainRow(-1, (0,), np.zeros(1, np.int32), np.zeros(1, np.float32), support, 0.0)
    micro = collate([row], {-1: 0.0}, device)
    return dataclasses.replace(micro, mask=torch.zeros_like(micro.mask), kept=None)
