"""Several texts in one row: less padding where lengths differ much, and none of them sees another.

Position ids start again from 0 with each text. transformers takes that for a packed row and masks everything that
stands before, sliding windows included; forward/flat_rows.py makes a tree of each text. A model that mixes them, such as
one that carries a state along the row, is refused before anything is trained. What is packed depends on the step's
lengths alone, not on the number of ranks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.errors import UserError
from grpo.forward.logprobs import Head
from grpo.training.exchange import collate
from grpo.types import MicroBatch, TrainRow

CHECKED = (7, 3, 12)  # tokens of the texts of the self-check
TOLERANCE = 5e-2  # of what the same texts would change if they did see each other


def pack(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put texts into rows of at most `capacity` tokens: longest first, each where it leaves the least room.

    A text that is longer than the capacity gets a row of its own.

    >>> pack([3, 9, 4, 2], capacity=9)
    [(1,), (2, 0, 3)]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fits = [row for row, left in enumerate(room) if left >= lengths[text]]
        if fits:
            best = min(fits, key=lambda row: (room[row], row))
        else:
            best = len(rows)
            rows.append([])
            room.append(capacity)
        rows[best].append(text)
        room[best] -= lengths[text]
    return [tuple(row) for row in rows]


def collate_packs(
    numbers: Sequence[int], packs: Sequence[Sequence[TrainRow]], weight: float, device: torch.device
) -> MicroBatch:
    """One micro-batch whose b-th row, called numbers[b], holds the texts packs[b] one after the other.

    Each text comes without its last token, which predicts nothing, so no text predicts another's first token.
    weight: of each token in the loss.
    """
    if all(len(texts) == 1 for texts in packs):
        alone = [texts[0] for texts in packs]
        return dataclasses.replace(collate(alone, {text.row: weight for text in alone}, device), rows=tuple(numbers))
    cpu = torch.device("cpu")
    rows = [[collate([text], {text.row: weight}, cpu) for text in texts] for texts in packs]
    starts = [np.cumsum([0, *(micro.input_ids.shape[1] for micro in row)]).tolist() for row in rows]

    def joined(name: str) -> Tensor:
        return _padded([torch.cat([getattr(micro, name)[0] for micro in row]) for row in rows]).to(device)

    places = [
        torch.cat([micro.positions[0] + start for micro, start in zip(row, here, strict=False)])
        for row, here in zip(rows, starts, strict=True)
    ]
    mask = _padded([torch.cat([micro.mask[0] for micro in row]) for row in rows])
    return MicroBatch(
        rows=tuple(numbers),
        input_ids=joined("input_ids"),
        positions=_padded(places).to(device),
        target_ids=joined("target_ids"),
        mask=mask.to(device),
        kept=mask.view(-1).nonzero()[:, 0].to(device),
        advantages=torch.zeros(len(rows), device=device),
        sampler_logprobs=joined("sampler_logprobs"),
        weights=joined("weights"),
        position_ids=position_ids(starts).to(device),
    )


def position_ids(starts: Sequence[Sequence[int]]) -> Tensor:
    """[B, L] int64: places of tokens within their own texts. starts: where a row's texts begin, then where it ends.

    Padding goes on counting from the last text: nothing looks to its right, so nothing sees it.

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
    """Compare hidden states of texts in one row with those of each alone. Raises UserError when they differ.

    The measure is how much the same row changes when its texts do see each other, whatever the model's scale.
    """
    body = Head(model).body()
    vocabulary = int(model.config.get_text_config().vocab_size)
    texts = [
        torch.arange(n * 5, n * 5 + length, device=model.device)[None] % vocabulary for n, length in enumerate(CHECKED)
    ]
    ids = position_ids([np.cumsum([0, *CHECKED]).tolist()]).to(model.device)
    try:
        alone = torch.cat([body(input_ids=text, use_cache=False).last_hidden_state for text in texts], 1)
        row = torch.cat(texts, 1)
        together = body(input_ids=row, position_ids=ids, use_cache=False).last_hidden_state
        mixed = body(input_ids=row, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"packing: {type(model).__name__} takes no position ids ({error}). Set packing: false."
        ) from None
    if not bool(torch.isfinite(alone).all()):
        return  # broken weights tell nothing; the guards will meet them
    apart, seen = (float((other - alone).abs().amax()) for other in (together, mixed))
    rounding = 1e-6 * float(alone.abs().amax())
    if apart > max(TOLERANCE * seen, rounding):
        raise UserError(
            f"packing: {type(model).__name__} lets texts of one row see each other: hidden states differ by "
            f"{apart:.2g} from those of each text alone, {seen:.2g} without any border. Set packing: false."
        )
