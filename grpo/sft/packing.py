"""Packing: several texts in one row, which saves padding when lengths differ much. No text attends to another.

Position ids start again from 0 with each text. transformers recognizes such a row as packed and masks all earlier
texts, also with sliding windows; forward/flat_rows.py treats each text as a prompt group of its own. A model that mixes
packed texts, such as one with a recurrent state, is refused before training. What is packed together depends on the
lengths of the step's texts only, not on the number of ranks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.errors import UserError
from grpo.forward.arguments import trial_ids
from grpo.forward.logprobs import Head
from grpo.training.collate import collate
from grpo.types import MicroBatch, TrainRow

CHECK_LENGTHS = (7, 3, 12)  # tokens of the texts of `check_packing`
TOLERANCE = 5e-2  # relative to the change of hidden states when the texts do attend to each other


def pack(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put texts into rows of at most `capacity` tokens: longest first, each into the row that it fills best.

    A text that is longer than the capacity gets a row of its own.

    >>> pack([3, 9, 4, 2], capacity=9)
    [(1,), (2, 0, 3)]
    """
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each row
    for text in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        candidates = [row for row, tokens in enumerate(free) if tokens >= lengths[text]]
        if candidates:
            best = min(candidates, key=lambda row: (free[row], row))
        else:
            best = len(rows)
            rows.append([])
            free.append(capacity)
        rows[best].append(text)
        free[best] -= lengths[text]
    return [tuple(row) for row in rows]


def collate_packs(
    numbers: Sequence[int], packs: Sequence[Sequence[TrainRow]], weight: float, device: torch.device
) -> MicroBatch:
    """One micro-batch whose b-th row, with the row number numbers[b], holds the texts packs[b] one after the other.

    Each text is without its last token, which predicts nothing, so no text predicts the first token of the next one.
    weight: of each token in the loss.
    """
    if all(len(texts) == 1 for texts in packs):
        unpacked = [texts[0] for texts in packs]
        weights = {text.row: weight for text in unpacked}
        return dataclasses.replace(collate(unpacked, weights, device), rows=tuple(numbers))
    # one micro-batch per text, and where each text begins in its row
    cpu = torch.device("cpu")
    rows = [[collate([text], {text.row: weight}, cpu) for text in texts] for texts in packs]
    starts = [np.cumsum([0, *(micro.input_ids.shape[1] for micro in row)]).tolist() for row in rows]

    def joined(name: str) -> Tensor:
        return _padded([torch.cat([getattr(micro, name)[0] for micro in row]) for row in rows]).to(device)

    # positions count from the start of the row, position ids from the start of the text
    positions = [
        torch.cat([micro.positions[0] + start for micro, start in zip(row, row_starts, strict=False)])
        for row, row_starts in zip(rows, starts, strict=True)
    ]
    trained = _padded([torch.cat([micro.trained[0] for micro in row]) for row in rows])
    return MicroBatch(
        rows=tuple(numbers),
        input_ids=joined("input_ids"),
        positions=_padded(positions).to(device),
        target_ids=joined("target_ids"),
        lengths=torch.tensor([sum(int(micro.lengths[0]) for micro in row) for row in rows], device=device),
        trained=trained.to(device),
        trained_index=trained.view(-1).nonzero()[:, 0].to(device),
        advantages=torch.zeros(len(rows), device=device),
        sampler_logprobs=joined("sampler_logprobs"),
        weights=joined("weights"),
        position_ids=position_ids(starts).to(device),
    )


def position_ids(starts: Sequence[Sequence[int]]) -> Tensor:
    """[B, L] int64: positions of tokens within their own texts. starts: where a row's texts begin, then where it ends.

    Padding continues the last text's positions: attention is causal, so no token attends to it.

    >>> position_ids([[0, 2, 5], [0, 3]]).tolist()
    [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    """
    width = max(row[-1] for row in starts)
    table = np.tile(np.arange(width), (len(starts), 1))
    for ids, row in zip(table, starts, strict=True):
        for start in row[1:-1]:
            ids[start:] = np.arange(width - start)
    return torch.from_numpy(table)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare the hidden states of packed texts with those of each text alone. Raises UserError when they differ.

    The difference is measured relative to the change when the texts do attend to each other, so that the tolerance
    does not depend on the model's scale.
    """
    body = Head(model).body()
    vocabulary = int(model.config.get_text_config().vocab_size)
    texts = trial_ids(sum(CHECK_LENGTHS), vocabulary, model.device)[None].split(CHECK_LENGTHS, 1)
    ids = position_ids([np.cumsum([0, *CHECK_LENGTHS]).tolist()]).to(model.device)
    try:
        alone = torch.cat([body(input_ids=text, use_cache=False).last_hidden_state for text in texts], 1)
        row = torch.cat(texts, 1)
        packed = body(input_ids=row, position_ids=ids, use_cache=False).last_hidden_state
        mixed = body(input_ids=row, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"packing: {type(model).__name__} accepts no position ids ({error}). Set packing: false."
        ) from None
    if not bool(torch.isfinite(alone).all()):
        return  # weights that are not finite decide nothing here; training skips such updates
    packed_error, mixed_error = (float((other - alone).abs().amax()) for other in (packed, mixed))
    rounding = 1e-6 * float(alone.abs().amax())
    if packed_error > max(TOLERANCE * mixed_error, rounding):
        raise UserError(
            f"packing: {type(model).__name__} lets texts of one row see each other: hidden states differ by "
            f"{packed_error:.2g} from those of each text alone, {mixed_error:.2g} without masking. Set packing: false."
        )
