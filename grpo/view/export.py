"""The page and its data as one file. It has a size limit; what did not fit is named on the page.

Curves and settings are always in it. Completions are taken in whole groups, evenly over the steps: the first group of
every step, then the second of every step, until the limit. Figures of tokens come with the completions they belong to.
"""

import base64
import gzip
import json
import time
from typing import Any

from grpo.view.page_files import page_with
from grpo.view.runs import RunLogs

MAX_MB = 20.0
SAMPLE = 40  # groups from which the size of all is estimated
SHRINK = 0.8  # of the groups stay when the estimate was too low


def report(runs: list[RunLogs], limit_mb: float = MAX_MB) -> bytes:
    """One HTML file with the runs, at most `limit_mb` * 10^6 bytes unless curves and page alone are larger."""
    limit = limit_mb * 1e6
    orders = [groups_in_order(run) for run in runs]
    rest = max(0.0, limit - len(_page(runs, [[] for _ in runs])))
    kept = []
    for run, order in zip(runs, orders):
        sample = order[:: max(1, len(order) // SAMPLE)]
        a_group = (len(_page([run], [sample])) - len(_page([run], [[]]))) / max(1, len(sample))
        kept.append(min(len(order), int(rest / len(runs) / max(1.0, a_group))))
    while True:
        page = _page(runs, [order[:count] for order, count in zip(orders, kept)])
        if len(page) <= limit or not any(kept):
            return page
        kept = [int(count * SHRINK) for count in kept]


def groups_in_order(run: RunLogs) -> list[list[int]]:
    """Numbers of the rows of each group: one group of every step, then the second of every step, and so on.

    The steps are in an order of which every beginning is spread over the run: 0, 1/2, 1/4, 3/4, 1/8 of it, ...
    """
    columns = run.rollouts.columns
    groups: dict[int, dict[int, list[int]]] = {}  # step -> question -> rows
    for number, (step, question) in enumerate(zip(columns["step"], columns["question"])):
        groups.setdefault(step, {}).setdefault(question, []).append(number)
    steps = sorted(groups)
    bits = len(steps).bit_length()
    spread = sorted(range(len(steps)), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2))
    of_steps = [list(groups[steps[place]].values()) for place in spread]
    most = max(map(len, of_steps), default=0)
    return [own[place] for place in range(most) for own in of_steps if place < len(own)]


def left_out(run: RunLogs, rows: list[int]) -> str | None:
    """What of a run's completions is not in an export; None: all are."""
    total = len(run.rollouts)
    if len(rows) == total:
        return None
    return f"{run.name}: {len(rows)} of {total} completions, whole groups, evenly over the steps"


def _page(runs: list[RunLogs], chosen: list[list[list[int]]]) -> bytes:
    parts, missing = [], []
    for run, groups in zip(runs, chosen):
        rows = sorted(row for group in groups for row in group)
        parts.append(_run_data(run, rows))
        if line := left_out(run, rows):
            missing.append(line)
    data = {"made": time.time(), "left_out": missing, "runs": parts}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return page_with(gzip.compress(text.encode("ascii"), 6, mtime=0))


def _run_data(run: RunLogs, rows: list[int]) -> dict[str, Any]:
    steps, numbers, held_out = (run.rollouts.columns[name] for name in ("step", "row", "held_out"))
    places = [(steps[row], numbers[row]) for row in rows if not held_out[row]]
    figures = {f"{step}:{row}": run.tokens.of(step, row) for step, row in places if (step, row) in run.tokens.where}
    return {
        "about": run.about(),
        "metrics": run.metrics.packed(),
        "rows": base64.b64encode(run.rollouts.packed(rows)).decode(),
        "records": run.rollouts.shown(rows, whole=True),
        "tokens": {place: one for place, one in figures.items() if one is not None},
    }
