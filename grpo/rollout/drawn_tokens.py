"""What was drawn: kept step by step while a batch decodes, and filed by row when rows leave it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.rollout import Request
from grpo.rollout.sampling import Draw
from grpo.types import Completion


class DrawnTokens:
    """The tokens of the rows of a batch, on the device until a row is done."""

    def __init__(self, max_new_tokens: int, device: torch.device):
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.requests: list[Request] = []
        self.drawn: list[tuple[Draw, Tensor]] = []  # of the steps since the last `file`
        self.columns: dict[str, Tensor] = {}  # name -> [B, max_new] or [B, max_new, K], as far as it is filed
        self.filed = torch.zeros(0, dtype=torch.int64, device=device)  # [B] tokens of each row

    def join(self, requests: Sequence[Request]) -> None:
        """Rows that begin now, behind the others. Call after `file`."""
        assert not self.drawn
        self.requests += requests
        self.filed = torch.cat([self.filed, self.filed.new_zeros(len(requests))])
        for name, column in self.columns.items():
            self.columns[name] = torch.cat([column, column.new_zeros(len(requests), *column.shape[1:])])

    def add(self, drawn: Draw, stopped: Tensor) -> None:
        """A step: one token of each row, and whether it ends the completion."""
        self.drawn.append((drawn, stopped))

    def file(self) -> None:
        """Sort what was drawn by row. A row that is done and still here has drawn what nobody will read."""
        if not self.drawn:
            return
        draws = [drawn for drawn, _ in self.drawn]
        parts = {
            "token_ids": torch.stack([drawn.token_ids.int() for drawn in draws], 1),
            "logprobs": torch.stack([drawn.logprobs for drawn in draws], 1),
            "finite": torch.stack([drawn.finite for drawn in draws], 1),
            "stopped": torch.stack([stopped for _, stopped in self.drawn], 1),
        }
        clamped = [drawn.clamped for drawn in draws]
        none = next((torch.zeros_like(one) for one in clamped if one is not None), None)
        if none is not None:
            parts["clamped"] = torch.stack([none if one is None else one for one in clamped], 1)
        if draws[0].support is not None:
            parts["support"] = torch.stack([drawn.support.int() for drawn in draws if drawn.support is not None], 1)
        rows = torch.arange(len(self.filed), device=self.device)[:, None]
        at = self.filed[:, None] + torch.arange(len(draws), device=self.device)
        for name, part in parts.items():
            if name not in self.columns:
                self.columns[name] = part.new_zeros(len(part), self.max_new_tokens, *part.shape[2:])
            self.columns[name][rows, at] = part
        self.filed = self.filed + len(draws)
        self.drawn = []

    def keep(self, order: np.ndarray) -> None:
        """Only these rows go on, in this order. Call after `file`."""
        self.requests = [self.requests[i] for i in order]
        index = torch.from_numpy(order).to(self.device)
        self.filed = self.filed[index]
        self.columns = {name: column[index] for name, column in self.columns.items()}

    def completions(self, rows: np.ndarray) -> list[Completion]:
        """These rows as they are, cut where they ended. Call after `file`."""
        index = torch.from_numpy(rows).to(self.device)
        columns = {name: column[index].cpu().numpy() for name, column in self.columns.items()}
        counts = self.filed[index].tolist()
        made = []
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            of = {name: column[i] for name, column in columns.items()}
            broken, ends = np.flatnonzero(~of["finite"][:count]), np.flatnonzero(of["stopped"][:count])
            length, finish = count, "length"
            if len(ends) and not (len(broken) and broken[0] <= ends[0]):
                length, finish = int(ends[0]) + 1, "stop"
            elif len(broken):
                length, finish = int(broken[0]), "error"
            made.append(
                Completion(
                    self.requests[row].row,
                    of["token_ids"][:length].copy(),
                    of["logprobs"][:length].copy(),
                    finish,
                    of["support"][:length].copy() if "support" in of else None,
                    int(of["clamped"][:length].sum()) if "clamped" in of else 0,
                )
            )
        return made
