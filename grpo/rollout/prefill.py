"""Keys and values of prompts: each prompt computed once, without padding, and a very long one piece by piece.

The simple path is `PlainCache.join` in caches.py, one padded forward of the model; tests compare the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo.forward.logprobs import Head
from grpo.forward.shared_attention import PromptGroup, SharedPrompts
from grpo.rollout import Request

KeysValues = tuple[Tensor, Tensor]

PREFILL_TOKENS = 8192  # tokens of prompts in one forward
PIECE = 2048  # tokens in one forward of a prompt that is longer


@dataclass(frozen=True)
class Prefilled:
    """P prompts; the prefix that all begin with is stored once."""

    logits: Tensor  # [P, V] of the first token of a completion
    lengths: Tensor  # [P] tokens after the prefix
    prefix: dict[int, KeysValues]  # layer -> keys, values [kvh, Lh, d]
    prompts: dict[int, KeysValues]  # layer -> keys, values [kvh, P, Lp, d]; padding repeats a prompt's last token


def distinct_prompts(requests: Sequence[Request], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """The distinct prompts, and which of them each request has, [B]."""
    distinct = list(dict.fromkeys(request.prompt_ids for request in requests))
    which = {ids: i for i, ids in enumerate(distinct)}
    return distinct, torch.tensor([which[request.prompt_ids] for request in requests], device=device)


def prefill(head: Head, prompts: Sequence[tuple[int, ...]], prefix_length: int) -> Prefilled:
    """Compute prompts that share their first `prefix_length` tokens and have at least one more each."""
    device = head.model.device
    rests = [ids[prefix_length:] for ids in prompts]
    places = torch.arange(max(map(len, rests)), device=device)
    logits: list[Tensor] = []
    prefix: dict[int, KeysValues] = {}
    padded: dict[int, list[KeysValues]] = {}  # layer -> keys, values of each part
    for part in _parts(rests):
        # one flat row: the prefix, then the prompts of this part
        shared_prompts = SharedPrompts([PromptGroup(len(ids)) for ids in part], device, prefix_length)
        row = torch.tensor([*prompts[0][:prefix_length], *(token for ids in part for token in ids)], device=device)
        ends = torch.tensor([prompt.stop for prompt in shared_prompts.prompts], device=device)
        starts = torch.tensor([prompt.start for prompt in shared_prompts.prompts], device=device)
        if len(part) == 1 and len(row) > PREFILL_TOKENS:
            hidden, keys_values = _by_pieces(head, row)
        else:
            hidden, keys_values = _at_once(head, row, shared_prompts, ends - 1)
        logits.append(head.logits(hidden))
        # cut the row's keys and values into the prefix and padded prompts
        index = torch.minimum(starts[:, None] + places, ends[:, None] - 1)  # [P, Lp]
        for layer, (keys, values) in keys_values.items():
            prefix[layer] = (keys[0, :, :prefix_length].clone(), values[0, :, :prefix_length].clone())
            padded.setdefault(layer, []).append((keys[0][:, index], values[0][:, index]))
    whole = {layer: (_cat([k for k, _ in parts]), _cat([v for _, v in parts])) for layer, parts in padded.items()}
    return Prefilled(torch.cat(logits), torch.tensor([len(ids) for ids in rests], device=device), prefix, whole)


def _at_once(
    head: Head, row: Tensor, shared_prompts: SharedPrompts, last: Tensor
) -> tuple[Tensor, dict[int, KeysValues]]:
    """Hidden states at `last` of several prompts in one row [S], and the row's keys and values [1, kvh, S, d]."""
    shared_prompts.keys_values = {}
    hidden = head.body()(input_ids=row[None], **shared_prompts.inputs()).last_hidden_state
    return hidden[0, last], shared_prompts.keys_values


def _by_pieces(head: Head, row: Tensor) -> tuple[Tensor, dict[int, KeysValues]]:
    """The same for one long prompt [S], piece by piece: hidden state of its last token [1, H], keys and values."""
    pieces = _Pieces()
    placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=row.device)
    hidden = row
    for start in range(0, len(row), PIECE):
        piece = row[start : start + PIECE]
        hidden = head.body()(
            input_ids=piece[None],
            position_ids=torch.arange(start, start + len(piece), device=row.device)[None],
            attention_mask=placeholder,
            use_cache=False,
            shared_prompts=pieces,
        ).last_hidden_state
    return hidden[0, -1:], pieces.keys_values


class _Pieces:
    """Keys and values of the pieces so far. Passed to the model as `shared_prompts`."""

    def __init__(self) -> None:
        self.keys_values: dict[int, KeysValues] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, H, n, d], key and value [1, kvh, n, d] of one piece -> [1, n, H, d]."""
        if torch.is_autocast_enabled(query.device.type):  # as SDPA casts
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # append to the earlier pieces
        if layer in self.keys_values:
            key, value = (torch.cat(both, 2) for both in zip(self.keys_values[layer], (key, value), strict=True))
        self.keys_values[layer] = (key, value)
        # the piece's queries are the last positions
        places = torch.arange(key.shape[2], device=key.device)
        own = places[-query.shape[2] :, None]
        visible = places <= own if window is None else (places <= own) & (own - places < window)
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale).transpose(1, 2)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _parts(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prompts in their order, cut into parts of at most PREFILL_TOKENS, or of one longer prompt."""
    parts: list[list[tuple[int, ...]]] = []
    for ids in prompts:
        if not parts or sum(map(len, parts[-1])) + len(ids) > PREFILL_TOKENS:
            parts.append([])
        parts[-1].append(ids)
    return parts
