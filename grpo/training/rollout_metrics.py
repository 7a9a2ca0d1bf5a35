"""Metrics of a step's rollout, from the table that every rank has."""

import numpy as np

from grpo.rewards import short_names
from grpo.rollout import Engine
from grpo.training.advantages import equal_groups
from grpo.training.metrics import Tally
from grpo.training.scoring import LATE
from grpo.types import Table

BEHIND = "rollout/updates_behind"


def rollout_metrics(table: Table, advantages: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Statistics of the rollout over all rows of all ranks. advantages: [N]."""
    tokens, trained = table.lengths.sum(), table.num_trained.sum()
    known = table.rewards[~np.isnan(table.rewards)]
    metrics = {
        "reward/zero_std_groups": float(equal_groups(table.grouped).mean()),
        "reward/failures": float(table.facts["failures"].sum()),
        "advantage/abs_mean": float(np.abs(advantages).mean()),
        "completions/length_mean": float(table.lengths.mean()),
        "completions/length_max": float(table.lengths.max()),
        "completions/length_min": float(table.lengths.min()),
        "completions/truncated": float(1 - (table.facts["stopped"] + table.facts["broken"]).mean()),
        "completions/broken": float(table.facts["broken"].sum()),
        "completions/tokens": float(tokens),
        "entropy": float(-table.facts["logprob_sum"].sum() / max(1, trained)),
        "guards/clamped_logits": float(table.facts["clamped"].sum() / max(1, tokens * vocab_size)),
    }
    if table.facts["entropy_sum"].any():  # the engine recorded entropies
        metrics["entropy/true"] = float(table.facts["entropy_sum"].sum() / max(1, trained))
    if len(known):
        metrics |= {"reward/mean": float(known.mean()), "reward/std": float(known.std())}
    for k, short in enumerate(short_names(table.names).values()):
        column = table.scores[:, k][~np.isnan(table.scores[:, k])]
        faults = table.faults[:, k]
        metrics[f"reward/{short}/failures"] = float((faults != 0).mean())
        metrics[f"reward/{short}/timeouts"] = float((faults == LATE).mean())
        if len(column):
            metrics |= {f"reward/{short}/mean": float(column.mean()), f"reward/{short}/std": float(column.std())}
    return metrics


def rest_engine(engine: Engine, tally: Tally) -> None:
    """The step's rollouts are over on all ranks: record what the engine found, and let it give its memory back."""
    engine.rest()
    tally.add("guards/oom_rollout", engine.fitting.halvings)
    if BEHIND in tally.maxima:
        tally.top(BEHIND, engine.behind)
