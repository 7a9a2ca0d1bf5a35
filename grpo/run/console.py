"""Output of rank 0: one line per step on stdout and in runs/<name>/train.log; on a terminal, a progress bar below."""

import io
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import ASCII
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from grpo.errors import warn
from grpo.training.metrics import PHASES

TABLE_WIDTH = 120  # without a terminal
LINES = "┏━┳┓┃┡╇┩├─┼┤│└┴┘"  # around the cells of a table


class Console:
    """Lines and the progress bar of a run; silent on other ranks."""

    def __init__(self, is_main: bool, log: Path | None = None):
        self.is_main = is_main
        self.log_file = log.open("a", encoding="utf-8") if is_main and log is not None else None
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def write_line(self, line: str) -> None:
        """Print a line and append it to train.log."""
        if not self.is_main:
            return
        if self.progress is not None:
            self.progress.console.print(line, markup=False)
        else:
            print(line, flush=True)
        self._append_to_log(line + "\n")

    def _append_to_log(self, text: str) -> None:
        try:
            if self.log_file is not None:
                self.log_file.write(text)
                self.log_file.flush()
        except OSError as error:  # a full disk must not end the run
            warn(f"warning: train.log cannot be written ({error}); it is left out from now on")
            self.log_file = None

    def show(self, table: Table) -> None:
        """Print a table, in colour on a terminal, and append it to train.log."""
        if not can_show(LINES):
            table.box = ASCII
        width = self.rich.width if self.rich.is_terminal else TABLE_WIDTH
        plain = RichConsole(file=io.StringIO(), width=width, color_system=None)
        plain.print(table)
        assert isinstance(plain.file, io.StringIO)
        if self.is_main and self.rich.is_terminal:
            (self.progress.console if self.progress else self.rich).print(table, soft_wrap=False)
        elif self.is_main:
            print(plain.file.getvalue(), end="", flush=True)
        self._append_to_log(plain.file.getvalue())

    def start(self, total: int, done: int, what: str = "training") -> None:
        """Show the progress bar when stdout is a terminal."""
        if self.is_main and self.rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.rich, transient=True)
            self.task = self.progress.add_task(what, total=total, completed=done)
            self.progress.start()

    def advance(self, description: str) -> None:
        """Advance the progress bar by one step."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=1, description=description)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.log_file is not None:
            self.log_file.close()


def json_line(value: Any) -> str:
    """A value as JSON that stdout can show: characters that its encoding lacks are escaped as JSON does it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if can_show(text) else json.dumps(value)


def can_show(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


def rounded(value: float, digits: int) -> float:
    """Rounded to what is shown, so that no 0 has a minus sign.

    >>> f"{rounded(-0.00004, 4):.4f} {rounded(-0.0, 3):+.3f} {rounded(-0.00006, 4):.4f}"
    '0.0000 +0.000 -0.0001'
    """
    return round(value, digits) + 0.0


def step_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """The console's line of one GRPO step. `grpo_loss` names the metric `loss`, whatever its weighting is."""
    parts = [
        f"step: {step}/{total}  grpo_loss: {rounded(metrics['loss'], 4):.4f}",
        reward_of(metrics),
        f"length {metrics['completions/length_mean']:.1f}",
    ]
    if "groups/drawn" in metrics:
        parts.append(f"groups {metrics['groups/kept']:.0f} of {metrics['groups/drawn']:.0f}")
    if "kl" in metrics:
        parts.append(f"kl {rounded(metrics['kl'], 5):.5f}")
    parts.append(_gradient_of(metrics))
    parts.append(f"{metrics['tokens_per_s']:.0f} tok/s")
    seconds = [f"{phase} {metrics[f'time/{phase}_s']:.2f}" for phase in PHASES if metrics[f"time/{phase}_s"] >= 0.005]
    return "  ".join(parts) + f"  {metrics['time/step_s']:.2f} s ({', '.join(seconds)})"


def reward_of(metrics: dict[str, float]) -> str:
    """Mean and standard deviation of the step's rewards; "none" where no completion has one."""
    if "reward/mean" not in metrics:
        return "reward none"
    return f"reward {rounded(metrics['reward/mean'], 3):.3f}±{metrics['reward/std']:.3f}"


def _gradient_of(metrics: dict[str, float]) -> str:
    return f"grad {metrics['grad_norm']:.3f}" if "grad_norm" in metrics else "update skipped"


def sft_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """The console's line of one supervised step."""
    parts = [f"step: {step}/{total}  sft_loss: {rounded(metrics['sft/loss'], 4):.4f}"]
    if "sft/token_accuracy" in metrics:
        parts.append(f"tokens right {metrics['sft/token_accuracy']:.1%}")
    parts.append(_gradient_of(metrics))
    parts.append(f"{metrics['tokens_per_s']:.0f} tok/s  {metrics['time/step_s']:.2f} s")
    return "  ".join(parts)
