"""From a plan and completions to micro-batches: the exchange that brings rows to who trains on them, and padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.config.settings import Config
from grpo.rollout.sampling import sampling_of
from grpo.runtime.distributed import World
from grpo.training.collate import collate
from grpo.training.losses import row_weights
from grpo.training.minibatches import Minibatch, trainers_of
from grpo.training.special_micro_batches import even_out
from grpo.types import Completion, MicroBatch, Prompt, Table, TrainRow


@dataclass(frozen=True)
class Payload:
    """What of a completion travels to the rank that trains on it, C tokens."""

    token_ids: np.ndarray  # [C] int32
    sampler_logprobs: np.ndarray  # [C] float32
    trained: np.ndarray  # [C] bool
    support: np.ndarray | None  # [C, K] int32

    def pack(self) -> np.ndarray:
        """As int32 words; `trained` takes a bit a token."""
        bits = np.packbits(self.trained)
        bits = np.pad(bits, (0, -len(bits) % 4)).view(np.int32)
        support = np.zeros(0, np.int32) if self.support is None else self.support.ravel()
        return np.concatenate([self.token_ids, self.sampler_logprobs.view(np.int32), bits, support]).astype(np.int32)

    @staticmethod
    def num_words(length: int, support_width: int) -> int:
        """Length of `pack`'s result for C = length and K = support_width.

        >>> Payload.num_words(33, 0), len(payload_of(Completion(0, *[np.zeros(33, np.int32)] * 2, "stop")).pack())
        (68, 68)
        """
        return length * (2 + support_width) + -(-length // 32)

    @staticmethod
    def unpack(words: np.ndarray, length: int, support_width: int) -> "Payload":
        """Undo `pack`."""
        words = words.copy()
        token_ids, logprobs, bits, support = np.split(words, np.cumsum([length, length, -(-length // 32)]))
        return Payload(
            token_ids,
            logprobs.view(np.float32),
            np.unpackbits(bits.view(np.uint8), count=length).astype(bool),
            support.reshape(length, support_width) if support_width else None,
        )


def payload_of(completion: Completion) -> Payload:
    """The part of a completion that is trained on."""
    return Payload(completion.token_ids, completion.sampler_logprobs, completion.trained, completion.support)


def exchange(
    world: World,
    completions: Sequence[Completion],
    lengths: np.ndarray,
    sampled_by: np.ndarray,
    trainers: dict[int, int],
    support_width: int,
) -> dict[int, Payload]:
    """Bring every row to the rank that trains on it, in one all-to-all.

    lengths: [N] completion tokens of each row; sampled_by: the rank that sampled it; trainers: row -> rank.
    """
    mine = {completion.row: payload_of(completion) for completion in completions}
    if world.size == 1:
        return {row: mine[row] for row in trainers}

    # what this rank sends to each rank, rows in ascending order
    outgoing = []
    for rank in range(world.size):
        rows = [n for n in sorted(trainers) if trainers[n] == rank and sampled_by[n] == world.rank]
        outgoing.append(np.concatenate([np.zeros(0, np.int32), *(mine[n].pack() for n in rows)]))

    # what it receives from each: sizes follow from the table that every rank has
    num_words = {n: Payload.num_words(int(lengths[n]), support_width) for n in trainers}
    wanted = [
        [n for n in sorted(trainers) if trainers[n] == world.rank and sampled_by[n] == rank]
        for rank in range(world.size)
    ]
    incoming = world.exchange(outgoing, [sum(num_words[n] for n in rows) for rows in wanted])

    received: dict[int, Payload] = {}
    for rows, words in zip(wanted, incoming, strict=True):
        parts = np.split(words, np.cumsum([num_words[n] for n in rows])[:-1]) if rows else []
        for row, part in zip(rows, parts, strict=True):
            received[row] = Payload.unpack(part, int(lengths[row]), support_width)
    return received


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
    lengths, num_trained = table.lengths, table.num_trained
    support = sampling_of(cfg).support_width
    rows = exchange(world, completions, lengths, table.sampled_by, trainers_of(plan), support)
    batches = []
    for minibatch in plan:
        weights = row_weights(cfg.weighting, [int(num_trained[n]) for n in minibatch.rows], cfg.max_generate_length)
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
                    rows[n].trained,
                )
                for n in micro
            ]
            mine.append(collate(train_rows, weight_of, world.device, flat=minibatch.shares_prompts))
        batches.append(even_out(mine, minibatch, num_trained, even_block, world, support) if even_block else mine)
    return batches
