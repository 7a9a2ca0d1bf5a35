"""Logged completions: question, gold answer, completion, rewards, advantage. As JSON lines, Markdown or a table.

Every rank writes the completions that it sampled to runs/<name>/rollouts-rank<R>.jsonl: no rank has all texts, and
no rank waits for another. `cat rollouts-rank*.jsonl` gives all completions of a step.
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
from grpo.rewards import completion_text, short_names
from grpo.run.console import rounded
from grpo.run.languages import label
from grpo.run.trackers.jsonl import open_after
from grpo.training.scoring import Scored, combine

NUM_SHOWN = 4  # completions in the Markdown text and in the table
MAX_CELL_CHARACTERS = 600


@dataclass(frozen=True)
class Rollout:
    """One completion with its rewards."""

    step: int
    row: int  # n of the step
    question: str
    gold: Any
    completion: str
    finish: str
    rewards: dict[str, float | None]  # by function; None: the function does not apply, or failed
    reward: float | None  # the weighted sum
    advantage: float


def rollouts_of(step: int, scored: Scored, advantages: np.ndarray, cfg: Config) -> list[Rollout]:
    """This rank's rollouts of a step, by row. advantages: [N], of all ranks."""
    totals = combine(scored.scores, list(cfg.rewards.values())) if len(scored.inputs) else np.zeros(0)
    rollouts = []
    for i, (completion, reward_input) in enumerate(zip(scored.completions, scored.inputs, strict=True)):
        question = reward_input.columns.get("question")
        rollouts.append(
            Rollout(
                step=step,
                row=completion.row,
                question=question if isinstance(question, str) else completion_text(reward_input.prompt),
                gold=reward_input.columns.get("answer"),
                completion=completion_text(reward_input.completion),
                finish=completion.finish,
                rewards={name: _none_if_nan(value) for name, value in zip(cfg.rewards, scored.scores[i], strict=True)},
                reward=_none_if_nan(totals[i]),
                advantage=float(advantages[completion.row]),
            )
        )
    return sorted(rollouts, key=lambda rollout: rollout.row)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


class RolloutFile:
    """Appends one rank's rollouts. A resumed run first drops lines of steps after `done`. Raises OSError."""

    def __init__(self, folder: Path, rank: int, done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open_after(folder / f"rollouts-rank{rank}.jsonl", done)

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Write one line per rollout."""
        for rollout in rollouts:
            self.file.write(json.dumps(vars(rollout), ensure_ascii=False, default=str) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def as_markdown(rollouts: Sequence[Rollout], language: str = "en") -> str:
    """A few rollouts for a tracker. Model text is escaped: HTML is not rendered, line breaks are preserved."""
    text = partial(label, language)
    none = text("none")
    blocks = []
    for rollout in rollouts[:NUM_SHOWN]:
        rewards = ", ".join(f"{name} {_number(value, none)}" for name, value in rollout.rewards.items())
        texts = (
            f"**{text('question')}** {rollout.question}",
            f"**{text('completion')}** {rollout.completion}",
            f"**{text('gold')}** {rollout.gold}, **{text('rewards')}** {rewards}, "
            f"**{text('sum')}** {_number(rollout.reward, none)}, "
            f"**{text('advantage')}** {rounded(rollout.advantage, 3):+.3f}",
        )
        blocks.append("\n\n".join(map(_escape, texts)))
    return "\n\n---\n\n".join(blocks)


def as_table(rollouts: Sequence[Rollout], language: str = "en") -> Table:
    """A few rollouts for the console."""
    text = partial(label, language)
    none = text("none")
    table = Table(title=text("completions", step=rollouts[0].step), show_lines=True)
    for name, ratio in (("question", 3), ("completion", 5), ("gold", 1), ("rewards", 2), ("advantage", 1)):
        table.add_column(text(name), ratio=ratio, overflow="fold")
    for rollout in rollouts[:NUM_SHOWN]:
        names = short_names(list(rollout.rewards))
        rewards = [f"{names[name]} {_number(value, none)}" for name, value in rollout.rewards.items()]
        rewards.append(f"{text('sum')} {_number(rollout.reward, none)}")
        advantage = f"{rounded(rollout.advantage, 3):+.3f}"
        cells = (rollout.question, rollout.completion, str(rollout.gold), "\n".join(rewards), advantage)
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    return table


def _number(value: float | None, none: str) -> str:
    return none if value is None else f"{value + 0.0:g}"


def _printable(text: str) -> str:
    """Replace control characters: a model's text must not control the terminal."""
    shown = text if len(text) <= MAX_CELL_CHARACTERS else text[:MAX_CELL_CHARACTERS] + " …"
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in shown)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "  \n")
