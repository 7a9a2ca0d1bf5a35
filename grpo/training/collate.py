"""Rows -> one padded micro-batch: the one place where predictions meet their targets."""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.forward.flat_rows import flatten
from grpo.types import MicroBatch, TrainRow


def collate(rows: Sequence[TrainRow], weights: dict[int, float], device: torch.device, flat: bool = True) -> MicroBatch:
    """Pad rows on the right. Token t of a completion is predicted at position len(prompt) - 1 + t.

    weights: loss weight of each token, by row. flat: also prepare the form without padding.

    >>> row = lambda n, prompt, *ids: TrainRow(n, prompt, np.array(ids), np.zeros(len(ids)), None, advantage=1.0)
    >>> micro = collate([row(4, (7, 8, 9), 1, 2), row(6, (5,), 3)], {4: 0.5, 6: 0.25}, torch.device("cpu"))
    >>> micro.input_ids.tolist(), micro.positions.tolist(), micro.target_ids.tolist()
    ([[7, 8, 9, 1], [5, 0, 0, 0]], [[2, 3], [0, 0]], [[1, 2], [3, 0]])
    >>> micro.trained.tolist(), micro.weights.tolist()
    ([[True, True], [True, False]], [[0.5, 0.5], [0.25, 0.0]])
    """
    num_rows = len(rows)
    longest = max(len(row.prompt_ids) + len(row.token_ids) - 1 for row in rows)  # the last token predicts nothing
    width = max(len(row.token_ids) for row in rows)
    input_ids = np.zeros((num_rows, longest), np.int64)
    positions, target_ids = np.zeros((num_rows, width), np.int64), np.zeros((num_rows, width), np.int64)
    logprobs, token_weights = np.zeros((num_rows, width), np.float32), np.zeros((num_rows, width), np.float32)
    trained = np.zeros((num_rows, width), bool)
    lengths = np.array([len(row.token_ids) for row in rows], np.int64)
    first = rows[0].support
    support = None if first is None else np.full((num_rows, width, first.shape[1]), -1, np.int64)
    chosen = None if rows[0].chosen is None else np.zeros((num_rows, width), bool)
    for b, row in enumerate(rows):
        prompt, length = len(row.prompt_ids), len(row.token_ids)
        input_ids[b, : prompt + length - 1] = [*row.prompt_ids, *row.token_ids[:-1].tolist()]
        positions[b, :length] = np.arange(prompt - 1, prompt - 1 + length)
        target_ids[b, :length] = row.token_ids
        trained[b, :length] = row.trained
        logprobs[b, :length] = row.sampler_logprobs
        token_weights[b, :length] = weights[row.row]
        if support is not None and row.support is not None:
            support[b, :length] = row.support
        if chosen is not None:
            chosen[b, :length] = row.chosen
    to_device = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return MicroBatch(
        rows=tuple(row.row for row in rows),
        input_ids=to_device(input_ids),
        positions=to_device(positions),
        target_ids=to_device(target_ids),
        lengths=to_device(lengths),
        trained=to_device(trained),
        advantages=to_device(np.array([row.advantage for row in rows], np.float32)),
        sampler_logprobs=to_device(logprobs),
        support=None if support is None else to_device(support),
        weights=to_device(token_weights),
        chosen=None if chosen is None else to_device(chosen),
        flat=flatten(input_ids, positions, lengths.clip(min=1), device) if flat else None,
        trained_index=to_device(np.flatnonzero(trained)),
    )
