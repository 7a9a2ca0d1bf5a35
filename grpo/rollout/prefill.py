"""The keys and values of prompts: each prompt computed once, without padding, and a very long one piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo.forward.logprobs import Head
from grpo.forward.shared_attention import Forest, Tree
from grpo.rollout import Request

KeysValues = tuple[Tensor, Tensor]

PREFILL_TOKENS = 8192  # prompts computed at once
PIECE = 2048  # tokens at once of a prompt that is longer


@dataclass(frozen=True)
class Prefilled:
    """P prompts, of which the header, what all begin with, stands apart."""

    logits: Tensor  # [P, V] of the first token of a completion
    lengths: Tensor  # [P] tokens after the header
    heads: dict[int, KeysValues]  # layer -> keys, values [kvh, Lh, d]
    stems: dict[int, KeysValues]  # layer -> keys, values [kvh, P, Lp, d]; after a prompt's end its last token, repeated


def distinct_prompts(requests: Sequence[Request], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """The distinct prompts, and which of them each request has, [B]."""
    distinct = list(dict.fromkeys(request.prompt_ids for request in requests))
    which = {ids: i for i, ids in enumerate(distinct)}
    return distinct, torch.tensor([which[request.prompt_ids] for request in requests], device=device)


def prefill(head: Head, prompts: Sequence[tuple[int, ...]], header: int) -> Prefilled:
    """Compute prompts that have their first `header` tokens in common, and at least one more each."""
    device = head.model.device
    rests = [ids[header:] for ids in prompts]
    at = torch.arange(max(map(len, rests)), device=device)
    logits: list[Tensor] = []
    heads: dict[int, KeysValues] = {}
    stems: dict[int, list[KeysValues]] = {}
    for part in _parts(rests):
        trees = _stems(part, header)
        row = torch.tensor([*prompts[0][:header], *(token for ids in part for token in ids)], device=device)
        ends = torch.tensor([tree.stem.stop for tree in trees], device=device)
        starts = torch.tensor([tree.start for tree in trees], device=device)
        long = len(part) == 1 and len(row) > PREFILL_TOKENS
        last, kept = _by_pieces(head, row) if long else _at_once(head, row, Forest(trees, device, header), ends - 1)
        logits.append(head.logits(last))
        index = torch.minimum(starts[:, None] + at, ends[:, None] - 1)  # [P, Lp]
        for layer, (keys, values) in kept.items():
            heads[layer] = (keys[0, :, :header].clone(), values[0, :, :header].clone())
            stems.setdefault(layer, []).append((keys[0][:, index], values[0][:, index]))
    whole = {layer: (_joined([k for k, _ in found]), _joined([v for _, v in found])) for layer, found in stems.items()}
    return Prefilled(torch.cat(logits), torch.tensor([len(ids) for ids in rests], device=device), heads, whole)


def _at_once(head: Head, row: Tensor, forest: Forest, last: Tensor) -> tuple[Tensor, dict[int, KeysValues]]:
    """Hidden states at `last` of several prompts in one row [S], and the row's keys and values [1, kvh, S, d]."""
    forest.prompts = {}
    hidden = head.body()(input_ids=row[None], **forest.inputs()).last_hidden_state
    return hidden[0, last], forest.prompts


def _by_pieces(head: Head, row: Tensor) -> tuple[Tensor, dict[int, KeysValues]]:
    """The same of one prompt [S] that is too long to be computed at once: hidden state of its end [1, H]."""
    pieces = _Pieces()
    placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=row.device)
    hidden = row
    for start in range(0, len(row), PIECE):
        piece = row[start : start + PIECE]
        position_ids = torch.arange(start, start + len(piece), device=row.device)[None]
        hidden = head.body()(
            input_ids=piece[None], position_ids=position_ids, attention_mask=placeholder, use_cache=False, trees=pieces
        ).last_hidden_state
    return hidden[0, -1:], pieces.kept


class _Pieces:
    """What came before the piece that is computed. Travels into the attention as `trees`."""

    def __init__(self) -> None:
        self.kept: dict[int, KeysValues] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, H, n, d], key and value [1, kvh, n, d] of one piece -> [1, n, H, d]."""
        if torch.is_autocast_enabled(query.device.type):  # as SDPA does
            kind = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(kind), key.to(kind), value.to(kind)
        if layer in self.kept:
            key, value = (torch.cat(both, 2) for both in zip(self.kept[layer], (key, value), strict=True))
        self.kept[layer] = (key, value)
        at = torch.arange(key.shape[2], device=key.device)
        mine = at[-query.shape[2] :, None]
        seen = at <= mine if window is None else (at <= mine) & (mine - at < window)
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).transpose(1, 2)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _parts(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prompts in their order, cut so that each part holds at most PREFILL_TOKENS, one prompt at least."""
    parts: list[list[tuple[int, ...]]] = []
    for ids in prompts:
        if not parts or sum(map(len, parts[-1])) + len(ids) > PREFILL_TOKENS:
            parts.append([])
        parts[-1].append(ids)
    return parts


def _stems(prompts: list[tuple[int, ...]], header: int) -> list[Tree]:
    trees: list[Tree] = []
    for ids in prompts:
        trees.append(Tree(trees[-1].stem.stop if trees else header, len(ids)))
    return trees
