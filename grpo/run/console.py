"""Output of rank 0: one line per step on stdout and in runs/<name>/train.log.

On a terminal the lines of steps are replaced by a view of two lines (live_view.py); train.log has them all.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import ASCII
from rich.console import Console as RichConsole
from rich.table import Table

from grpo.errors import printable, warn
from grpo.run.live_view import LiveView
from grpo.training.metrics import PHASES

TABLE_WIDTH = 120  # without a terminal
LINES = "┏━┳┓┃┡╇┩├─┼┤│└┴┘"  # around the cells of a table


class Console:
    """Lines and the live view of a run; silent on other ranks. quiet: only train.log is written."""

    def __init__(self, is_main: bool, log: Path | None = None, quiet: bool = False):
        self.is_main = is_main
        self.log_file = log.open("a", encoding="utf-8") if is_main and log is not None else None
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.view: LiveView | None = None
        self.step_lines = True  # the key l switches them where there is a view
        self.held_out = ""  # the last evaluation, in the view

    def write_line(self, line: str) -> None:
        """Print a line and append it to train.log."""
        if not self.is_main:
            return
        line = printable(line)
        self._print(line)
        self._append_to_log(line + "\n")

    def _print(self, line: str) -> None:
        if self.quiet:
            return
        if self.view is not None:
            self.rich.print(line, markup=False, emoji=False)
        else:
            print(line, flush=True)

    def write_step(self, line: str, metrics: dict[str, float], description: str) -> None:
        """A step is done: its line, or where there is a live view its figures there. description: before the bar."""
        if not self.is_main:
            return
        if self.step_lines:
            self._print(line)
        self._append_to_log(line + "\n")
        if self.view is not None:
            self.view.show_step(metrics, self.held_out)
            self.view.advance(description)

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
        if self.is_main and self.rich.is_terminal and not self.quiet:
            self.rich.print(table, soft_wrap=False)
        elif self.is_main and not self.quiet:
            print(plain.file.getvalue(), end="", flush=True)
        self._append_to_log(plain.file.getvalue())

    def start(self, total: int, done: int, what: str = "training", sample: Callable[[], None] | None = None) -> None:
        """Show the live view when stdout is a terminal. sample: prints the last completion, for the key s."""
        if not self.is_main or self.quiet or not self.rich.is_terminal or self.rich.is_dumb_terminal:
            return
        keys: dict[str, Callable[[], None]] = {}
        if sample is not None:
            self.step_lines = False
            keys = {"s": sample, "l": self._switch_lines}
        self.view = LiveView(self.rich, what, total, done, keys)
        self.view.start()

    def _switch_lines(self) -> None:
        self.step_lines = not self.step_lines

    def advance(self, description: str) -> None:
        """Advance the progress bar by one step."""
        if self.view is not None:
            self.view.advance(description)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.view is not None:
            self.view.stop()
            self.view = None
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
        f"step: {step}/{total}  {reward_of(metrics)}",
        f"grpo_loss: {rounded(metrics['loss'], 4):.4f}",
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
