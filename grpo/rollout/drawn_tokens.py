"""The drawn tokens of a batch: collected step by step while it decodes, and by row when rows leave it."""

from collections.abc import MutableSequence, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.rollout import Request
from grpo.rollout.sampling import Draw
from grpo.types import Completion


class DrawnTokens:
    """The tokens of a batch's B rows, on the device until a row is finished."""

    def __init__(self, max_new_tokens: int, device: torch.device):
        self.max_new_tokens, self.device = max_new_tokens, device
        self.requests: list[Request] = []
        self.pending: list[tuple[Draw, Tensor]] = []  # draws and stopped [B] of the steps since the last `flush`
        self.columns: dict[str, Tensor] = {}  # name -> [B, max_new] or [B, max_new, K], what was flushed
        self.counts = torch.zeros(0, dtype=torch.int64, device=device)  # [B] flushed tokens of each row
        self.histories: dict[int, MutableSequence[int]] = {}  # by row: its tokens on the host, for stop strings

    def join(self, requests: Sequence[Request]) -> None:
        """Append rows that start now. Call after `flush`."""
        assert not self.pending
        self.requests += requests
        self.counts = torch.cat([self.counts, self.counts.new_zeros(len(requests))])
        for name, column in self.columns.items():
            self.columns[name] = torch.cat([column, column.new_zeros(len(requests), *column.shape[1:])])

    def add(self, drawn: Draw, stopped: Tensor) -> None:
        """Add a step: one token of each row; stopped [B]: whether it ends the completion."""
        self.pending.append((drawn, stopped))

    def flush(self) -> None:
        """Write the pending steps into `columns`. Tokens drawn after a row finished are ignored later."""
        if not self.pending:
            return
        draws = [drawn for drawn, _ in self.pending]
        parts = {  # [B, steps] of each quantity
            "token_ids": torch.stack([drawn.token_ids.int() for drawn in draws], 1),
            "logprobs": torch.stack([drawn.logprobs for drawn in draws], 1),
            "finite": torch.stack([drawn.finite for drawn in draws], 1),
            "stopped": torch.stack([stopped for _, stopped in self.pending], 1),
        }
        if any(drawn.clamped is not None for drawn in draws):
            none = torch.zeros_like(draws[0].token_ids)
            parts["clamped"] = torch.stack([none if drawn.clamped is None else drawn.clamped for drawn in draws], 1)
        if draws[0].support is not None:
            parts["support"] = torch.stack([drawn.support.int() for drawn in draws if drawn.support is not None], 1)
        if draws[0].entropy is not None:
            parts["entropy"] = torch.stack([drawn.entropy for drawn in draws if drawn.entropy is not None], 1)
        # each row continues at its own count
        rows = torch.arange(len(self.counts), device=self.device)[:, None]
        places = self.counts[:, None] + torch.arange(len(draws), device=self.device)
        for name, part in parts.items():
            if name not in self.columns:
                self.columns[name] = part.new_zeros(len(part), self.max_new_tokens, *part.shape[2:])
            self.columns[name][rows, places] = part
        self.counts = self.counts + len(draws)
        self.pending = []

    def keep(self, order: np.ndarray) -> None:
        """Keep only these rows, in this order. Call after `flush`."""
        self.requests = [self.requests[i] for i in order]
        index = torch.from_numpy(order).to(self.device)
        self.counts = self.counts[index]
        self.columns = {name: column[index] for name, column in self.columns.items()}

    def completions(self, rows: np.ndarray) -> list[Completion]:
        """The completions of these rows, cut where they ended. Call after `flush`."""
        index = torch.from_numpy(rows).to(self.device)
        columns = {name: column[index].cpu().numpy() for name, column in self.columns.items()}
        counts = self.counts[index].tolist()
        completions = []
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            drawn = {name: column[i] for name, column in columns.items()}
            # the first token that ends it, or the first draw from logits that were not finite
            ends = np.flatnonzero(drawn["stopped"][:count] | ~drawn["finite"][:count])
            length, finish = count, "length"
            if len(ends):
                is_finite = bool(drawn["finite"][ends[0]])
                length, finish = int(ends[0]) + is_finite, "stop" if is_finite else "error"
            completions.append(
                Completion(
                    self.requests[row].row,
                    drawn["token_ids"][:length].copy(),
                    drawn["logprobs"][:length].copy(),
                    finish,
                    drawn["support"][:length].copy() if "support" in drawn else None,
                    int(drawn["clamped"][:length].sum()) if "clamped" in drawn else 0,
                    entropy=drawn["entropy"][:length].copy() if "entropy" in drawn else None,
                )
            )
        return completions
