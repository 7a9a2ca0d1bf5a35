"""Which folders are runs; a run's settings, its end, and its logs.

run.json and exit.json stand in the folders of runs since they are written there. Of earlier runs the settings are read
from the TensorBoard events and the end from train.log, as far as they say it.
"""

import re
import time
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.strict_json import parse_json
from grpo.view.lines import open_regular, read_small
from grpo.view.metrics import FILE, Metrics
from grpo.view.rollouts import Rollouts
from grpo.view.tokens import Tokens

MAX_RUNS = 500
MAX_FILE = 2**22  # bytes of run.json and exit.json
LOG_END = 2**16  # bytes at the end of train.log that are read
QUIET_S = 120  # a run without an end whose files are older is not called running
SETTINGS_IN_EVENTS = re.compile(rb"```json\n(\{\n.*?\n\})\n```", re.S)
STEP_LINE = re.compile(r"^step: (\d{1,9})/(\d{1,9}) ", re.M)


def is_run(folder: Path) -> bool:
    """Whether a folder has logs of a run."""
    return (folder / FILE).is_file() or any(folder.glob("rollouts-rank*.jsonl"))


def find_runs(roots: list[Path]) -> list[tuple[str, Path]]:
    """Name and folder of each run: the folders named, and the runs directly in them. Links in them are left out.

    Raises UserError for a folder that does not exist or has no runs.
    """
    found: dict[Path, str] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"runs: {root} is no folder. Name the folder of a run, or one with runs in it (runs_dir).")
        try:
            inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError as error:
            raise UserError(f"runs: {root} cannot be read: {error}.") from None
        own = [root] if is_run(root) else []
        for folder in own + [path for path in inside if is_run(path)]:
            found.setdefault(folder.resolve(), folder.resolve().name)
    if not found:
        raise UserError(
            f"runs: no run in {', '.join(map(str, roots))}: a run's folder has metrics.jsonl or rollouts-rank0.jsonl. "
            "Name runs_dir, or the folder of a run."
        )
    names = list(found.values())
    named = [
        (name if names.count(name) == 1 else f"{folder.parent.name}/{name}", folder) for folder, name in found.items()
    ]
    return named[:MAX_RUNS]


class RunLogs:
    """The logs of one run, read as they grow."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.folder = folder
        self.metrics = Metrics(folder)
        self.rollouts = Rollouts(folder)
        self.tokens = Tokens(folder)
        self._settings: dict[str, Any] | None = None

    def refresh(self) -> None:
        """Read what was written since the last call."""
        for part in (self.metrics, self.rollouts, self.tokens):
            part.refresh()

    def _object(self, name: str) -> dict[str, Any]:
        try:
            value = parse_json(read_small(self.folder / name, MAX_FILE))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def settings(self) -> dict[str, Any] | None:
        """The run's settings; None where nothing has recorded them."""
        recorded = self._object("run.json").get("settings")
        if isinstance(recorded, dict):
            return recorded
        if self._settings is None:
            self._settings = settings_in_events(self.folder) or {}
        return self._settings or None

    def about(self) -> dict[str, Any]:
        """What the page lists of a run."""
        facts, end = self._object("run.json"), self._object("exit.json")
        written = self._written()
        line = STEP_LINE.findall(_end_of(self.folder / "train.log"))
        total = (
            facts.get("total_steps") if type(facts.get("total_steps")) is int else int(line[-1][1]) if line else None
        )
        done, code = self.metrics.last_step, end.get("code")
        if type(code) is int:
            state = "done" if code == 0 else "ended"
        elif facts and time.time() - written < max(QUIET_S, 3 * (self.metrics.last("time/step_s") or 0.0)):
            state = "running"
        else:
            state = "done" if total is not None and done >= total else "unknown"
        return {
            "name": self.name,
            "state": state,
            "code": code if type(code) is int else None,
            "reason": str(end.get("reason", ""))[:2000],
            "started": facts.get("started") if isinstance(facts.get("started"), str) else None,
            "written": round(written, 1),
            "steps": done,
            "total": total,
            "settings": self.settings(),
            "reward": self.metrics.last("reward/mean"),
            "versions": {
                "metrics": [self.metrics.generation, self.metrics.lines],
                "rollouts": [self.rollouts.generation, len(self.rollouts)],
                "tokens": [self.tokens.generation, len(self.tokens.where)],
            },
            "problems": self.metrics.problems() + self.rollouts.problems() + self.tokens.problems(),
        }

    def _written(self) -> float:
        """When a log of the run was last written, in seconds since 1970."""
        times = [0.0]
        for path in [self.folder / FILE, *self.folder.glob("rollouts-rank*.jsonl")]:
            try:
                times.append(path.lstat().st_mtime)
            except OSError:
                continue
        return max(times)


def _end_of(path: Path) -> str:
    """The last lines of a log as text; "" where there is none."""
    try:
        with open_regular(path) as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_END))
            return file.read(LOG_END).decode("utf-8", "replace")
    except OSError:
        return ""


def settings_in_events(folder: Path) -> dict[str, Any] | None:
    """The settings that the TensorBoard tracker wrote as text; of several files those of the newest."""
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        try:
            with open_regular(path) as file:
                found = SETTINGS_IN_EVENTS.search(file.read(2**20))
            value = parse_json(found[1]) if found else None
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            return value
    return None
