"""When a number is not finite: skip the update on all ranks, count it, write evidence, stop after too many in a row.

A skipped update advances the step and the data, never the optimizer or the schedule. Its micro-batches are written to
output_dir/anomalies/step_N, one file per rank, with a copy of the weights; `python -m grpo.replay` runs it again.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from grpo.errors import Diverged
from grpo.types import Counters, MicroBatch

KEPT_WEIGHTS = 2  # copies of weights on disk, the newest


class SkippedUpdate(Exception):
    """All ranks dropped an update; the message gives the reason."""

    def __init__(self, reason: str, losses: Sequence[float]):
        super().__init__(reason)
        self.losses = list(losses)  # of this rank's micro-batches; empty: the rollout was broken already


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one rank writes about a skipped update, beside the tensors of its micro-batches."""

    reason: str
    rank: int
    weights: str  # file of the weights before the update, relative to the folder of the evidence
    losses: list[str]  # of the micro-batches, as text, because JSON has no NaN
    iteration: int  # which pass over the step's rows, from 0
    trust_sampler: bool | None  # see Counters
    rows: list[list[int]]  # n of each row of each micro-batch
    config: dict[str, Any]
    num_tokens: int | None = None  # ids that may be sampled; None: all
    updates: int = 0  # optimizer steps taken before it; they key the dropout masks of an adapter
    entropy_coef: float | None = None  # see Counters
    last_entropy: float | None = None  # see Counters


def quarantine(folder: Path, evidence: Evidence, minibatch: Sequence[MicroBatch]) -> None:
    """Write this rank's evidence and micro-batches of a skipped update. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, micro in enumerate(minibatch):
        for f in dataclasses.fields(micro):
            value = getattr(micro, f.name)
            if isinstance(value, Tensor) and f.name != "trained_index":  # follows from `trained`
                copy = value.detach().cpu().contiguous().clone()  # old log-probs may be the sampler's own tensor
                tensors[f"micro_{i}.{f.name}"] = copy
    save_file(tensors, folder / f"rank_{evidence.rank}.safetensors")
    text = json.dumps(dataclasses.asdict(evidence), ensure_ascii=False, indent=2)
    (folder / f"rank_{evidence.rank}.json").write_text(text + "\n", encoding="utf-8")


class KeptWeights:
    """Copies of the weights before skipped updates: one for as long as they stay the same, the newest KEPT_WEIGHTS."""

    def __init__(self, anomalies: Path, rank: int):
        self.anomalies = anomalies
        self.name = f"weights_rank_{rank}.safetensors"
        self.updates = -1  # optimizer steps behind the copy
        self.folder = Path()

    def keep(self, folder: Path, weights: Iterable[tuple[str, Tensor]], updates: int, write: bool, whole: bool) -> str:
        """Copy the weights after `updates` optimizer steps, unless there is one. Returns its path relative to `folder`.

        Only ranks with `write` write. Where weights are sharded (not `whole`), streaming them is a collective, so all
        ranks must decide equally: by `updates` alone. Raises OSError.
        """
        if updates != self.updates or (whole and write and not (self.folder / self.name).exists()):
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights if write}
            self.updates, self.folder = updates, folder
            if write:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / self.name)
                self._drop_old()
        name = self.name if write else "weights_rank_0.safetensors"
        return f"../{self.folder.name}/{name}"

    def _drop_old(self) -> None:
        steps = sorted(self.anomalies.glob(f"step_*/{self.name}"), key=lambda path: path.stat().st_mtime)
        for path in steps[:-KEPT_WEIGHTS]:
            path.unlink()


def count_skip(counters: Counters, limit: int) -> None:
    """Count a skipped update. Raises Diverged at the `limit`-th in a row."""
    counters.skipped_updates += 1
    counters.consecutive_skips += 1
    if counters.consecutive_skips >= limit:
        raise Diverged(
            f"training: {limit} updates in a row met NaN or Inf and were skipped. The minibatches are under "
            "output_dir/anomalies; lower --lr, or look at the data and rewards. (--max_bad_steps sets the limit.)"
        )
