"""A micro-batch as one row without padding, each prompt once, for grpo/forward/shared_attention.py.

    rows    [prompt A, a1, a2]          flat    [A, C, a1, a2, b1, c1]
            [prompt A, b1,  - ]
            [prompt C, c1,  - ]

Log-probs and gradient are those of the padded rows, which are the simple path (`Scorer._row_inputs` in logprobs.py),
from fewer tokens: no padding, a prompt once for all rows that share it, and the common prefix of all prompts once.
"""

from collections.abc import Sequence

import numpy as np
import torch

from grpo.forward.precision import host_reads_are_free
from grpo.forward.shared_attention import PromptGroup, SharedPrompts
from grpo.types import Flat, MicroBatch

MIN_COMMON_PREFIX = 16  # tokens; for a shorter one the bookkeeping costs more than it saves


def flatten(
    input_ids: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
    device: torch.device,
    position_ids: np.ndarray | None = None,
) -> Flat:
    """Flatten rows: input_ids [B, L], positions [B, T], lengths [B] targets of each row, at least one.

    Adjacent rows with the same prompt share it, and the common prefix of all prompts stands once at the start. With
    position_ids [B, L], where several texts share a row, each text becomes a group of its own and nothing is shared.
    """
    if position_ids is not None:
        return _flatten_texts(input_ids, positions, lengths, device, position_ids)
    prompt_lengths = positions[:, 0] + 1  # the first target is predicted by the prompt's last token
    prefix = common_prefix([row[:length] for row, length in zip(input_ids, prompt_lengths, strict=True)])
    # adjacent rows with the same prompt are a group
    firsts: list[int] = []  # the first row of each group
    for b, length in enumerate(prompt_lengths.tolist()):
        last = input_ids[firsts[-1], : prompt_lengths[firsts[-1]]] if firsts else None
        if last is None or not np.array_equal(input_ids[b, :length], last):
            firsts.append(b)
    groups = []
    tokens = [input_ids[0, :prefix], *(input_ids[b, prefix : prompt_lengths[b]] for b in firsts)]
    prompt_end, end = prefix, sum(map(len, tokens))
    flat_positions = np.zeros_like(positions)
    for first, stop in zip(firsts, [*firsts[1:], len(input_ids)], strict=True):
        prompt_end += int(prompt_lengths[first]) - prefix
        for b in range(first, stop):
            # the first target is predicted by the prompt, the others by the completion's tokens but the last
            own = int(lengths[b]) - 1
            flat_positions[b, 0] = prompt_end - 1
            flat_positions[b, 1 : own + 1] = np.arange(end, end + own)
            tokens.append(input_ids[b, prompt_lengths[b] : prompt_lengths[b] + own])
            end += own
        own_lengths = tuple((lengths[first:stop] - 1).tolist())
        groups.append(PromptGroup(int(prompt_lengths[first]) - prefix, own_lengths))
    return _to_device(groups, tokens, flat_positions, device, prefix)


def common_prefix(prompts: Sequence[Sequence[int] | np.ndarray]) -> int:
    """How many tokens all prompts begin with; each prompt keeps at least one after them.

    0 for a single distinct prompt, and for a prefix shorter than MIN_COMMON_PREFIX.

    >>> common_prefix([[*range(40), 7, 8], [*range(40), 9]]), common_prefix([[1, 2], [1, 3]])
    (40, 0)
    """
    distinct = {tuple(prompt) for prompt in prompts}
    shortest = min(map(len, distinct)) - 1
    if len(distinct) < 2 or shortest < MIN_COMMON_PREFIX:
        return 0
    table = np.array([prompt[:shortest] for prompt in distinct])
    differs = (table != table[0]).any(0)
    length = int(differs.argmax()) if differs.any() else shortest
    return length if length >= MIN_COMMON_PREFIX else 0


def flatten_micro_batch(micro: MicroBatch) -> Flat:
    """Flatten a micro-batch that was collated without a flat form; several device syncs."""
    to_host = lambda tensor: tensor.cpu().numpy()  # noqa: E731
    position_ids = None if micro.position_ids is None else to_host(micro.position_ids)
    lengths = to_host(micro.lengths).clip(min=1)  # an idle row has no targets, but still one input token
    return flatten(to_host(micro.input_ids), to_host(micro.positions), lengths, micro.input_ids.device, position_ids)


def _flatten_texts(
    input_ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray, device: torch.device, position_ids: np.ndarray
) -> Flat:
    groups: list[PromptGroup] = []
    tokens: list[np.ndarray] = []
    flat_positions = np.zeros_like(positions)
    end = 0
    for b, count in enumerate(lengths.tolist()):
        used = int(positions[b, :count].max()) + 1
        flat_positions[b, :count] = end + positions[b, :count]
        starts = np.flatnonzero(position_ids[b, :used] == 0).tolist()
        groups += [PromptGroup(j - i) for i, j in zip(starts, [*starts[1:], used], strict=True)]
        tokens.append(input_ids[b, :used])
        end += used
    return _to_device(groups, tokens, flat_positions, device)


def _to_device(
    groups: list[PromptGroup],
    tokens: list[np.ndarray],
    flat_positions: np.ndarray,
    device: torch.device,
    prefix_length: int = 0,
) -> Flat:
    row = torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None]
    shared_prompts = SharedPrompts(groups, device, prefix_length)
    if not host_reads_are_free(device):
        shared_prompts.copy_indices()  # now: the same copy within an update would leave the device without work
    return Flat(shared_prompts, row.to(device), torch.from_numpy(flat_positions).to(device))
