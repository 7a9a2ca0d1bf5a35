"""What a terminal shows while a run trains: progress, time left, the last rewards as a curve; keys ask for more.

Two lines at the bottom, drawn anew; everything else scrolls above them. Keys: s prints the last completion, l switches
the line of every step on and off. They are read where stdin is a terminal that this process may read.
"""

import contextlib
import os
import select
import sys
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
CURVE = 24  # steps in the curve
POLL_S = 0.2  # how soon a key is noticed
REDRAWS = 4  # a second


def sparkline(values: list[float], bars: str = BARS) -> str:
    """A curve of one character a value, from the lowest to the highest of them.

    >>> sparkline([0.0, 0.5, 1.0]), sparkline([2.0, 2.0])
    ('▁▅█', '▁▁')
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in values)


class LiveView:
    """The two lines and the keys. `keys`: what a pressed key calls, in a thread of its own."""

    def __init__(self, console: RichConsole, what: str, total: int, done: int, keys: dict[str, Callable[[], None]]):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task(what, total=total, completed=done)
        self.line = Text("", no_wrap=True, overflow="ellipsis")
        self.live = Live(get_renderable=self._lines, console=console, refresh_per_second=REDRAWS, transient=True)
        self.keys = Keys(keys)
        self.bars = BARS if _can_encode(console, BARS) else ASCII_BARS
        self.rewards: deque[float] = deque(maxlen=CURVE)

    def _lines(self) -> RenderableType:
        return Group(self.progress, self.line) if self.line.plain else self.progress

    def start(self) -> None:
        """Begin to draw, and to read keys."""
        self.live.start()
        self.keys.start()

    def stop(self) -> None:
        """Remove the two lines, give the terminal back."""
        self.keys.stop()
        self.live.stop()

    def advance(self, description: str) -> None:
        """One more step; description: what stands before the bar."""
        self.progress.update(self.task, advance=1, description=description)

    def show_step(self, metrics: dict[str, float], held_out: str) -> None:
        """The second line: figures of a step, and of the last evaluation."""
        parts = []
        if (reward := metrics.get("reward/mean")) is not None:
            self.rewards.append(reward)
        if self.rewards:
            parts.append(f"reward {sparkline(list(self.rewards), self.bars)} {self.rewards[-1]:.3f}")
        for name, form in SHOWN.items():
            if name in metrics:
                parts.append(form.format(metrics[name]))
        parts += [held_out] if held_out else []
        parts += [self.keys.hint] if self.keys.hint else []
        self.line = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


SHOWN = {
    "sft/loss": "loss {:.3f}",
    "completions/length_mean": "length {:.1f}",
    "completions/truncated": "cut {:.0%}",
    "tokens_per_s": "{:.0f} tok/s",
    "time/step_s": "{:.2f} s",
}


def _can_encode(console: RichConsole, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except (UnicodeError, LookupError):
        return False
    return True


class Keys:
    """Single keys from the terminal, without Enter. Does nothing where stdin is no terminal of this process."""

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions
        self.before: list[Any] | None = None  # the terminal's settings
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def hint(self) -> str:
        """Which keys there are; "" where none are read."""
        return "[s] sample [l] lines" if self.thread is not None else ""

    def start(self) -> None:
        """Read keys from now on."""
        if not self.actions or not _may_read_terminal():
            return
        try:
            self.before = termios.tcgetattr(0)
            changed = termios.tcgetattr(0)
            changed[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(0, termios.TCSADRAIN, changed)
        except termios.error:
            self.before = None
            return
        self.thread = threading.Thread(target=self._read, name="keys", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Read no more, and set the terminal as it was."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(2 * POLL_S)
            self.thread = None
        if self.before is not None and _may_read_terminal():  # in the background it would stop the job
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self.before)
        self.before = None

    def _read(self) -> None:
        for key in self._pressed():
            action = self.actions.get(key.lower())
            if action is not None:
                action()

    def _pressed(self) -> Iterator[str]:
        while not self.ended.is_set():
            try:
                if not select.select([0], [], [], POLL_S)[0]:
                    continue
                if not _may_read_terminal():  # in the background now: reading would stop the job
                    self.ended.wait(POLL_S)
                    continue
                data = os.read(0, 64)
            except (OSError, ValueError):  # the terminal is gone
                return
            if not data:
                return
            yield from data.decode("ascii", "ignore")


def _may_read_terminal() -> bool:
    """Whether stdin is a terminal that does not stop this process for reading: not that of a job in the background."""
    try:
        if sys.stdin is None or not os.isatty(0):
            return False
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # not the controlling terminal of this session: reading it has no such rule
        return True
