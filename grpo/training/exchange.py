"""From a plan and completions to micro-batches: every row moves to the rank that trains on it and is collated there."""

from collections.abc import Sequence

import numpy as np

from grpo.config.settings import Config
from grpo.rollout.sampling import sampling_of
from grpo.runtime.distributed import World
from grpo.training.collate import collate
from grpo.training.entropy import choose_recorded
from grpo.training.minibatches import Minibatch, trainers_of
from grpo.training.payload import Payload, payload_of
from grpo.training.special_micro_batches import even_out
from grpo.training.user_table_functions import load_weighting
from grpo.types import Completion, MicroBatch, Prompt, Table, TrainRow


def exchange(
    world: World,
    completions: Sequence[Completion],
    table: Table,
    trainers: dict[int, int],
    support_width: int,
    chosen: dict[int, np.ndarray] | None = None,
) -> dict[int, Payload]:
    """Move every row to the rank that trains on it, in one all-to-all. Returns row -> payload of this rank's rows.

    completions: of the rows that this rank sampled; trainers: row -> rank that trains on it; chosen: see Payload.
    """
    chooses, chosen = chosen is not None, chosen or {}
    sampled = {completion.row: payload_of(completion, chosen.get(completion.row)) for completion in completions}
    if world.size == 1:
        return {row: sampled[row] for row in trainers}
    lengths, sampled_by = table.lengths, table.sampled_by

    # pack what goes to each rank, rows in ascending order
    outgoing = []
    for rank in range(world.size):
        rows = [n for n in sorted(trainers) if trainers[n] == rank and sampled_by[n] == world.rank]
        outgoing.append(np.concatenate([np.zeros(0, np.int32), *(sampled[n].pack() for n in rows)]))

    # the sizes of what comes from each rank follow from the table
    num_words = {n: Payload.num_words(int(lengths[n]), support_width, chooses) for n in trainers}
    incoming_rows = [
        [n for n in sorted(trainers) if trainers[n] == world.rank and sampled_by[n] == rank]
        for rank in range(world.size)
    ]
    incoming = world.exchange(outgoing, [sum(num_words[n] for n in rows) for rows in incoming_rows])

    # cut it into rows
    received: dict[int, Payload] = {}
    for rows, words in zip(incoming_rows, incoming, strict=True):
        pieces = np.split(words, np.cumsum([num_words[n] for n in rows])[:-1]) if rows else []
        for row, piece in zip(rows, pieces, strict=True):
            received[row] = Payload.unpack(piece, int(lengths[row]), support_width, chooses)
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
    """This rank's micro-batches of each minibatch of the plan, their weights divided by the global denominators.

    completions: of the rows that this rank sampled. advantages: [N]. even_block: tokens in a block of the head where
    every rank must run as many micro-batches and blocks as the busiest one (backends that shard weights); else 0.

    >>> from torch import device
    >>> facts = {"length": np.array([2, 1]), "trained": np.array([2, 1])}
    >>> table = Table([], np.zeros((2, 0)), np.zeros(2), facts, num_generations=2)
    >>> ids = [np.array([5, 0], np.int32), np.array([6], np.int32)]  # two completions of the prompt (7, 8)
    >>> sampled = [Completion(n, ids[n], np.zeros(len(ids[n]), np.float32), "stop") for n in (0, 1)]
    >>> plan = [Minibatch(rows=(0, 1), micro_batches=((0, 1),), owners=(0,))]
    >>> world, cfg = World(0, 1, 0, 1, device("cpu")), Config(num_generations=2)
    >>> [[micro]] = deliver(world, cfg, plan, [Prompt(0, "", (7, 8), {})], sampled, table, np.array([1.0, -1.0]))
    >>> micro.input_ids.tolist(), micro.target_ids.tolist(), micro.weights.tolist()
    ([[7, 8, 5], [7, 8, 0]], [[5, 0], [6, 0]], [[0.25, 0.25], [0.5, 0.0]])
    """
    num_trained, support_width = table.num_trained, sampling_of(cfg).support_width
    chosen = choose_recorded(world, cfg, [minibatch.rows for minibatch in plan], completions, table)
    payloads = exchange(world, completions, table, trainers_of(plan), support_width, chosen)
    prompt_of = {n: prompts[n // cfg.num_generations].token_ids for n in payloads}
    train_rows = {n: TrainRow(n, prompt_of[n], advantage=float(advantages[n]), **vars(payloads[n])) for n in payloads}
    batches = []
    for minibatch in plan:
        weights = load_weighting(cfg, world)([int(num_trained[n]) for n in minibatch.rows], cfg.max_generate_length)
        weight_of = dict(zip(minibatch.rows, weights, strict=True))
        mine = [
            collate([train_rows[n] for n in rows], weight_of, world.device, flat=minibatch.shares_prompts)
            for rows in minibatch.of_rank(world.rank)
        ]
        batches.append(even_out(mine, minibatch, num_trained, even_block, world, support_width) if even_block else mine)
    return batches
