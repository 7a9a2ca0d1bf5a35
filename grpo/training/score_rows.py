"""Log-probs of single completions by the trained model, for who compares a sampler with it."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.training.collate import collate
from grpo.types import Completion, MicroBatch, TrainRow


def scorer_of(
    score: Callable[[MicroBatch], Tensor], device: torch.device, flat: bool, block_tokens: int
) -> Callable[[Sequence[tuple[tuple[int, ...], Completion]], int], list[np.ndarray]]:
    """(prompt ids, completion)s, tokens of the rank with most -> [C] log-probs of each.

    score: log-probs [rows, C] of a micro-batch. block_tokens: of a block of the head. Where weights are sharded each
    block is a collective, so all ranks take as many as the one with most tokens.
    """

    @torch.no_grad()
    def of_all(asked: Sequence[tuple[tuple[int, ...], Completion]], most_tokens: int) -> list[np.ndarray]:
        rows = [
            TrainRow(n, prompt_ids, one.token_ids, one.sampler_logprobs, one.support, 0.0)
            for n, (prompt_ids, one) in enumerate(asked)
        ]
        micro = collate(rows, dict.fromkeys(range(len(rows)), 0.0), device, flat)
        micro = dataclasses.replace(micro, head_blocks=math.ceil(most_tokens / block_tokens))
        found = score(micro).float().cpu().numpy()
        return [logprobs[: len(row.token_ids)] for logprobs, row in zip(found, rows, strict=True)]

    return of_all
