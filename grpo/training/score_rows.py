"""Log-probs of single completions by the trained model, for who compares a sampler with it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.training.collate import collate
from grpo.types import Completion, MicroBatch, TrainRow


def scorer_of(
    score: Callable[[MicroBatch], Tensor], device: torch.device, flat: bool
) -> Callable[[Sequence[tuple[tuple[int, ...], Completion]]], list[np.ndarray]]:
    """(prompt ids, completion)s -> [C] log-probs of each. score: log-probs [rows, C] of a micro-batch."""

    @torch.no_grad()
    def of_all(asked: Sequence[tuple[tuple[int, ...], Completion]]) -> list[np.ndarray]:
        rows = [
            TrainRow(n, prompt_ids, one.token_ids, one.sampler_logprobs, one.support, 0.0)
            for n, (prompt_ids, one) in enumerate(asked)
        ]
        found = score(collate(rows, dict.fromkeys(range(len(rows)), 0.0), device, flat)).float().cpu().numpy()
        return [logprobs[: len(row.token_ids)] for logprobs, row in zip(found, rows, strict=True)]

    return of_all
