"""What a run left in its folder, read for the rules: also of old, copied, unfinished or damaged runs.

Nothing in the files is trusted. Lines that are not what they should be are left out and counted; of a file larger than
`limit` bytes the head and the tail are read.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any, TypeGuard

from grpo.errors import UserError

METRICS_LIMIT = 2**26  # bytes
ROLLOUTS_LIMIT = 2**27  # bytes, in all files together
HEAD = 0.25  # share of the limit that is spent on the start of a file
HEAD_LIMIT = 2**20  # bytes of other files; the settings are at the start of TensorBoard's
EXIT_WITHIN_S = 3600.0  # exit.json in output_dir is this run's if it was written so soon after the last metrics
LOG_LINES = 50  # at the start of train.log: model, data, warnings


@dataclass(frozen=True)
class Row:
    """One logged completion."""

    step: int
    row: int  # n of the step
    question: str
    gold: str | None
    completion: str
    finish: str  # stop, length or error
    reward: float | None  # the weighted sum
    rewards: dict[str, float | None] = field(default_factory=dict)  # by function
    extracted: str | None = None


@dataclass(frozen=True)
class Recording:
    """A run. `steps` and `evals` are in order; an evaluation after step n has step n."""

    name: str
    steps: list[dict[str, float]]  # metrics of each training step
    evals: list[dict[str, float]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # {}: not known
    ended: tuple[int, str] | None = None  # exit code and reason; None: not known
    log: list[str] = field(default_factory=list)  # the first lines of train.log
    unreadable: int = 0  # lines

    @cached_property
    def third(self) -> int:
        """Steps in a third of the run, at least 1."""
        return max(1, len(self.steps) // 3)

    def first(self, name: str) -> list[float]:
        """A metric's values in the first third."""
        return [metrics[name] for metrics in self.steps[: self.third] if name in metrics]

    def last(self, name: str) -> list[float]:
        """A metric's values in the last third."""
        return [metrics[name] for metrics in self.steps[-self.third :] if name in metrics]

    def all(self, name: str) -> list[float]:
        """A metric's values in the whole run."""
        return [metrics[name] for metrics in self.steps if name in metrics]

    def total(self, name: str) -> float:
        """Sum over the run; 0 where it is not logged."""
        return math.fsum(self.all(name))

    def span(self) -> dict[str, int]:
        """The steps of the last third, for a finding's text."""
        if not self.steps:
            return {"begin": 0, "end": 0}
        return {"begin": int(self.steps[-self.third]["step"]), "end": int(self.steps[-1]["step"])}

    @cached_property
    def last_rows(self) -> list[Row]:
        """Logged completions of the last third; where none are, those of the last logged step."""
        if not self.rows:
            return []
        begin = min(self.span()["begin"], self.rows[-1].step)
        return [row for row in self.rows if row.step >= begin]

    @cached_property
    def reward_names(self) -> list[str]:
        """Short names of the reward functions, in the order of the settings."""
        names: dict[str, None] = {}
        for metrics in self.steps:
            for name in metrics:
                inner, _, last = name.removeprefix("reward/").rpartition("/")
                if name.startswith("reward/") and inner and last in ("mean", "failures"):
                    names[inner] = None
        return list(names)

    @cached_property
    def task(self) -> str:
        """The metric of the first reward function, which evaluations use too."""
        return f"reward/{self.reward_names[0]}/mean" if self.reward_names else "reward/mean"

    def scores(self, name: str, rows: Sequence[Row]) -> list[float]:
        """Scores of one reward function, by its short name, in logged completions."""
        at = self.reward_names.index(name)
        found = (list(row.rewards.values()) for row in rows if len(row.rewards) == len(self.reward_names))
        return [scores[at] for scores in found if scores[at] is not None]  # type: ignore[misc]

    def range_of(self, name: str | None = None) -> tuple[float, float]:
        """Lowest and highest score of a function (None: the sum) in logged completions, and at least 0.

        Where no completion is logged, or none got more than 0, the highest is the largest mean, and at least 1.
        """
        if name is None:
            found = [row.reward for row in self.rows if row.reward is not None]
        else:
            found = self.scores(name, self.rows)
        means = self.all(f"reward/{name}/mean" if name else "reward/mean")
        top = max(found, default=0.0)
        return min([0.0, *found, *means]), top if top > 0 else max([1.0, *means])

    def rise(self, name: str) -> "Rise | None":
        """How a metric changed from the first third to the last; None: too few values."""
        return rise(self.first(name), self.last(name))

    @cached_property
    def group_size(self) -> int:
        """G, from the settings or from rows of one question that follow each other; 0: not known."""
        if (given := int(self.number("num_generations", 0))) > 0:
            return given
        sizes, size = [], 0
        for before, row in zip([None, *self.rows], self.rows):
            follows = before is not None and (row.step, row.row, row.question) == (
                before.step,
                before.row + 1,
                before.question,
            )
            if not follows and size:
                sizes.append(size)
            size = size + 1 if follows else 1
        return min([*sizes, size]) if size else 0

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Completions of one prompt together; groups that were not logged whole are left out."""
        size = self.group_size
        found: dict[tuple[int, int], list[Row]] = {}
        for row in rows if size else ():
            found.setdefault((row.step, row.row // size), []).append(row)
        return [group for group in found.values() if len(group) == size]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the run, where it is known."""
        return self.config.get(name, default)

    def number(self, name: str, default: float) -> float:
        """A setting that is a number; the default where it is not known, or something else."""
        value = self.config.get(name)
        return value if _is_number(value) else default


@dataclass(frozen=True)
class Rise:
    """Means over the first and the last third, and their difference in standard errors."""

    first: float
    last: float
    z: float


def rise(first: Sequence[float], last: Sequence[float]) -> Rise | None:
    """Compare two series. z is 0 where nothing changed, and infinite where neither varies.

    >>> rise([0.0, 0.0], [1.0, 1.0]), rise([], [1.0])
    (Rise(first=0.0, last=1.0, z=inf), None)
    """
    if len(first) < 2 or len(last) < 2:
        return None
    a, b = fmean(first), fmean(last)
    error = math.sqrt(pvariance(first) / (len(first) - 1) + pvariance(last) / (len(last) - 1))
    gain = b - a
    z = gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0
    return Rise(a, b, z)


def read_run(folder: Path, limit: int = ROLLOUTS_LIMIT) -> Recording:
    """Read a run's folder. limit: bytes of completions. Raises UserError when it is no run."""
    file = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(
            f"run: {ascii(str(folder))[1:-1]} is not a folder. Give the folder of a run, such as runs/demo."
        )
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))[:5]
        hint = f" It holds runs: {', '.join(map(ascii, inside))}." if inside else ""
        raise UserError(
            f"run: {ascii(str(folder))[1:-1]} has no metrics.jsonl, which every run writes. Give the folder of a run, "
            f"such as runs/demo.{hint}"
        )
    bad = [0]
    steps: dict[int, dict[str, float]] = {}
    evals: dict[int, dict[str, float]] = {}
    for line in _objects(file, METRICS_LIMIT, bad):
        metrics = {name: float(value) for name, value in line.items() if _is_number(value)}
        if metrics.get("step", -1.0) < 0:
            bad[0] += 1
            continue
        of_step = int(metrics["step"])
        if any(name.startswith("eval/") for name in metrics):
            evals.setdefault(of_step, {"step": float(of_step)}).update(metrics)
        if any(name.startswith(("time/", "reward/", "completions/")) for name in metrics):
            steps[of_step] = metrics
    config = _config_of(folder)
    return Recording(
        name=folder.resolve().name,
        steps=[steps[step] for step in sorted(steps)],
        evals=[evals[step] for step in sorted(evals)],
        rows=_rows_of(folder, limit, bad),
        config=config,
        ended=_ended(folder, config),
        log=_log_of(folder),
        unreadable=bad[0],
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < 1e300


def _objects(file: Path, limit: int, bad: list[int]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; others are counted in bad[0]. An unfinished last line is no fault."""
    for line in _lines(file, limit):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            bad[0] += line.endswith(b"\n")
            continue
        if isinstance(value, dict):
            yield value
        else:
            bad[0] += 1


def _lines(file: Path, limit: int) -> Iterator[bytes]:
    """Lines of a file, without the middle of one that is larger than `limit` bytes."""
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            if size <= limit:
                yield from opened
                return
            head = int(limit * HEAD)
            yield from (line for line in opened.read(head).splitlines(keepends=True) if line.endswith(b"\n"))
            opened.seek(size - (limit - head))
            yield from opened.read(limit - head).splitlines(keepends=True)[1:]
    except OSError:
        return


def _rows_of(folder: Path, limit: int, bad: list[int]) -> list[Row]:
    found: dict[tuple[int, int], Row] = {}
    files = sorted(folder.glob("rollouts-rank*.jsonl"))
    for file in files:
        for line in _objects(file, limit // len(files), bad):
            row = _row(line)
            if row is None:
                bad[0] += 1
            else:
                found[row.step, row.row] = row
    return [found[key] for key in sorted(found)]


def _row(line: dict[str, Any]) -> Row | None:
    """A logged completion; None when the line is something else."""
    step, row, question, completion = (line.get(name) for name in ("step", "row", "question", "completion"))
    if (
        type(step) is not int
        or type(row) is not int
        or not isinstance(question, str)
        or not isinstance(completion, str)
    ):
        return None
    rewards = line.get("rewards")
    gold, extracted, reward = line.get("gold"), line.get("extracted"), line.get("reward")
    return Row(
        step=step,
        row=row,
        question=question,
        gold=None if gold is None else gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False),
        completion=completion,
        finish=str(line.get("finish", "")),
        reward=float(reward) if _is_number(reward) else None,
        rewards={str(k): float(v) if _is_number(v) else None for k, v in rewards.items()}
        if isinstance(rewards, dict)
        else {},
        extracted=extracted if isinstance(extracted, str) else None,
    )


def _config_of(folder: Path) -> dict[str, Any]:
    """The settings: from run.json, or of an older run the text that TensorBoard shows; {}: neither can be read."""
    try:
        value = json.loads(_head(folder / "run.json"))
        if isinstance(value, dict) and isinstance(value.get("settings"), dict):
            return value["settings"]
    except (OSError, ValueError, RecursionError):
        pass
    for file in sorted(folder.glob("events.out.tfevents.*")):
        try:
            _, found, rest = _head(file).partition(b"```json\n")
            value = json.loads(rest.partition(b"\n```")[0]) if found else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _ended(folder: Path, config: dict[str, Any]) -> tuple[int, str] | None:
    """Code and reason of the run's end: exit.json beside the metrics (copied there), or in output_dir."""
    output_dir = config.get("output_dir")
    try:
        last = (folder / "metrics.jsonl").stat().st_mtime
        file = folder / "exit.json"
        if not file.is_file():
            if not isinstance(output_dir, str):
                return None
            file = Path(output_dir) / "exit.json"
            if not -1 <= file.stat().st_mtime - last <= EXIT_WITHIN_S:
                return None
        value = json.loads(_head(file))
        if isinstance(value, dict) and type(value.get("code")) is int:
            return value["code"], str(value.get("reason", ""))
    except (OSError, ValueError, RecursionError):
        return None
    return None


def _log_of(folder: Path) -> list[str]:
    try:
        return _head(folder / "train.log").decode("utf-8", errors="replace").splitlines()[:LOG_LINES]
    except OSError:
        return []


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(HEAD_LIMIT)
