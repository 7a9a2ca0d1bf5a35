"""What happens when a number is not finite: skip on all ranks, count, keep the evidence, stop after K.

A skipped update moves the data cursor and the step, never the optimizer or the schedule. The minibatch is
written to output_dir/anomalies/step_N, one file a rank, with the name of the weights it met.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from grpo.errors import Diverged
from grpo.types import Counters, MicroBatch


class SkippedUpdate(Exception):
    """An update that all ranks dropped together; the message says why."""


def quarantine(
    folder: Path, rank: int, minibatch: Sequence[MicroBatch], weights: str, reason: str, config: dict[str, object]
) -> None:
    """Write this rank's micro-batches of a skipped update, and what weights they met."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, micro in enumerate(minibatch):
        for f in dataclasses.fields(micro):
            value = getattr(micro, f.name)
            if isinstance(value, torch.Tensor):
                tensors[f"micro_{i}.{f.name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / f"rank_{rank}.safetensors")
    about = {
        "reason": reason,
        "weights": weights,
        "samples": [list(micro.samples) for micro in minibatch],
        "config": config,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def count_skip(counters: Counters, limit: int) -> None:
    """Count a skipped update. Raises Diverged when it is the `limit`-th in a row."""
    counters.skipped_updates += 1
    counters.consecutive_skips += 1
    if counters.consecutive_skips >= limit:
        raise Diverged(
            f"training: {limit} updates in a row met NaN or Inf and were skipped. The minibatches are under "
            "output_dir/anomalies; lower --lr, or look at the data and rewards. (--max_bad_steps sets the limit.)"
        )
