"""Rollouts kept to be read: question, gold answer, completion, each reward, advantage. As JSON lines, text or a table.

Every rank writes the completions that it sampled to runs/<name>/rollouts-rank<R>.jsonl: no rank sees all texts, and
none waits for another. `cat rollouts-rank*.jsonl` is the whole of a step.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from grpo.config.settings import Config
from grpo.rewards import completion_text
from grpo.run.languages import label
from grpo.training.scoring import Scored, combine

SHOWN = 4  # completions as text or in the table
CELL = 600  # characters of a text in the table


@dataclass(frozen=True)
class Rollout:
    """One completion with what it earned."""

    step: int
    row: int  # n of the step
    question: str
    gold: Any
    completion: str
    finish: str
    rewards: dict[str, float | None]  # by function; None: it does not apply, or failed
    reward: float | None  # their weighted sum
    advantage: float


def rollouts_of(step: int, scored: Scored, advantages: np.ndarray, cfg: Config) -> list[Rollout]:
    """This rank's rollouts of a step, by row. advantages: [N], of all ranks."""
    totals = combine(scored.scores, list(cfg.rewards.values())) if len(scored.inputs) else np.zeros(0)
    found = []
    for i, (completion, given) in enumerate(zip(scored.completions, scored.inputs, strict=True)):
        question = given.columns.get("question")
        found.append(
            Rollout(
                step=step,
                row=completion.row,
                question=question if isinstance(question, str) else completion_text(given.prompt),
                gold=given.columns.get("answer"),
                completion=completion_text(given.completion),
                finish=completion.finish,
                rewards={name: _known(value) for name, value in zip(cfg.rewards, scored.scores[i], strict=True)},
                reward=_known(totals[i]),
                advantage=float(advantages[completion.row]),
            )
        )
    return sorted(found, key=lambda rollout: rollout.row)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


class RolloutFile:
    """Appends one rank's rollouts; a resumed run first drops the lines it will write again. Raises OSError."""

    def __init__(self, folder: Path, rank: int, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rollouts-rank{rank}.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
            path.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """One line for each."""
        for rollout in rollouts:
            self.file.write(json.dumps(vars(rollout), ensure_ascii=False, default=str) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def as_markdown(rollouts: Sequence[Rollout], language: str = "en") -> str:
    """A few rollouts for a tracker. Model text is shown, not rendered: no HTML, line breaks kept."""
    say = partial(label, language)
    none = say("none")
    blocks = []
    for one in rollouts[:SHOWN]:
        earned = ", ".join(f"{name} {_number(value, none)}" for name, value in one.rewards.items())
        texts = (
            f"**{say('question')}** {one.question}",
            f"**{say('completion')}** {one.completion}",
            f"**{say('gold')}** {one.gold}, **{say('rewards')}** {earned}, "
            f"**{say('sum')}** {_number(one.reward, none)}, **{say('advantage')}** {one.advantage:+.3f}",
        )
        blocks.append("\n\n".join(map(_escape, texts)))
    return "\n\n---\n\n".join(blocks)


def as_table(rollouts: Sequence[Rollout], language: str = "en") -> Table:
    """A few rollouts for the console."""
    say = partial(label, language)
    none = say("none")
    table = Table(title=say("completions", step=rollouts[0].step), show_lines=True)
    for name, ratio in (("question", 3), ("completion", 5), ("gold", 1), ("rewards", 2), ("advantage", 1)):
        table.add_column(say(name), ratio=ratio, overflow="fold")
    for one in rollouts[:SHOWN]:
        earned = [f"{name.rpartition(':')[2]} {_number(value, none)}" for name, value in one.rewards.items()]
        earned.append(f"{say('sum')} {_number(one.reward, none)}")
        cells = (one.question, one.completion, str(one.gold), "\n".join(earned), f"{one.advantage:+.3f}")
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    return table


def _number(value: float | None, none: str) -> str:
    return none if value is None else f"{value:g}"


def _printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    shown = text if len(text) <= CELL else text[:CELL] + " …"
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in shown)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "  \n")
