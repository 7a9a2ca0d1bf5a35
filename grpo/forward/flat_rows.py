"""A micro-batch as one row without padding, each prompt once: what grpo/forward/shared_attention.py computes on.

    rows    [prompt A, a1, a2]          flat    [A, a1, a2, b1, C, c1]
            [prompt A, b1,  - ]
            [prompt C, c1,  - ]

Same log-probs, same gradient, fewer tokens: padding is left out, and a prompt that several rows share stands once. So
does what all prompts begin with, a system prompt or worked examples.
"""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.forward.precision import host_reads_are_free
from grpo.forward.shared_attention import Forest, Tree
from grpo.types import Flat, MicroBatch

SHORTEST_HEADER = 16  # tokens; below, the bookkeeping costs more than it saves


def flatten(
    input_ids: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
    device: torch.device,
    position_ids: np.ndarray | None = None,
) -> Flat:
    """Flatten rows: input_ids [B, L], positions [B, T], lengths [B] targets of each row, at least one.

    Rows one behind the other with the same prompt share it, and what all prompts begin with stands once at the start.
    With position_ids [B, L], where several texts stand in a row, each text becomes a tree of its own, and nothing is
    shared.
    """
    if position_ids is not None:
        return _texts(input_ids, positions, lengths, device, position_ids)
    trees: list[Tree] = []
    tokens: list[np.ndarray] = []
    where = np.zeros_like(positions)
    prompt = np.zeros(0, input_ids.dtype)
    branches: list[int] = []
    header = common_header([row[: at[0] + 1] for row, at in zip(input_ids, positions, strict=True)])
    tokens.append(input_ids[0, :header])
    start = end = header
    for b, count in enumerate(lengths.tolist()):
        row, stem = input_ids[b], int(positions[b, 0]) + 1  # the first target is predicted by the prompt's last token
        if b == 0 or not np.array_equal(row[:stem], prompt):
            if b:
                trees.append(Tree(start, len(prompt) - header, tuple(branches)))
            prompt, branches, start = row[:stem], [], end
            tokens.append(prompt[header:])
            end += stem - header
        where[b, 0] = start + stem - header - 1
        where[b, 1:count] = np.arange(end, end + count - 1)
        tokens.append(row[stem : stem + count - 1])
        branches.append(count - 1)
        end += count - 1
    trees.append(Tree(start, len(prompt) - header, tuple(branches)))
    return _flat(trees, tokens, where, device, header)


def common_header(prompts: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Tokens that all prompts begin with, where there are several and it is worth it; each keeps one of its own.

    >>> common_header([[*range(40), 7, 8], [*range(40), 9]]), common_header([[1, 2], [1, 3]])
    (40, 0)
    """
    distinct = {tuple(prompt) for prompt in prompts}
    shortest = min(map(len, distinct)) - 1
    if len(distinct) < 2 or shortest < SHORTEST_HEADER:
        return 0
    table = np.array([prompt[:shortest] for prompt in distinct])
    differs = (table != table[0]).any(0)
    header = int(differs.argmax()) if differs.any() else shortest
    return header if header >= SHORTEST_HEADER else 0


def flatten_micro_batch(micro: MicroBatch) -> Flat:
    """The flat form of a micro-batch that was not made with one; reads its tensors from the device."""
    to = lambda tensor: tensor.cpu().numpy()  # noqa: E731
    own = None if micro.position_ids is None else to(micro.position_ids)
    lengths = to(micro.mask.sum(-1)).clip(min=1)  # an idle row has no token that counts, and keeps its one input
    return flatten(to(micro.input_ids), to(micro.positions), lengths, micro.input_ids.device, own)


def _texts(
    input_ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray, device: torch.device, position_ids: np.ndarray
) -> Flat:
    trees: list[Tree] = []
    tokens: list[np.ndarray] = []
    where = np.zeros_like(positions)
    end = 0
    for b, count in enumerate(lengths.tolist()):
        used = int(positions[b, :count].max()) + 1
        where[b, :count] = end + positions[b, :count]
        starts = np.flatnonzero(position_ids[b, :used] == 0).tolist()
        trees += [Tree(end + i, j - i) for i, j in zip(starts, [*starts[1:], used], strict=True)]
        tokens.append(input_ids[b, :used])
        end += used
    return _flat(trees, tokens, where, device)


def _flat(
    trees: list[Tree], tokens: list[np.ndarray], where: np.ndarray, device: torch.device, header: int = 0
) -> Flat:
    row = torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None]
    forest = Forest(trees, device, header)
    if not host_reads_are_free(device):
        forest.position_ids  # noqa: B018  copied now: in the midst of an update the device would run dry meanwhile
    return Flat(forest, row.to(device), torch.from_numpy(where).to(device))
