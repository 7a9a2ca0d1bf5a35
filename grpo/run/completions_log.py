"""Logged completions: question, gold answer, completion, rewards, advantage. As JSON lines, Markdown or a table.

Every rank writes the completions that it sampled to runs/<name>/rollouts-rank<R>.jsonl: no rank has all texts, and
no rank waits for another. `cat rollouts-rank*.jsonl` gives all completions of a step. Answers to held-out questions are
in held_out-rank<R>.jsonl, in the same form. The Markdown and the table show the step's first rows, whichever rank
sampled them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from grpo.config.settings import Config
from grpo.errors import printable, warn
from grpo.reward_library.scanning import inside
from grpo.rewards import Reward, completion_text, short_names
from grpo.rewards.logged import Logs, means
from grpo.run.console import rounded
from grpo.run.languages import label
from grpo.run.trackers.jsonl import drop_after, open_after
from grpo.runtime.distributed import World
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
    extracted: str | None = None  # the answer in the completion; None: not found, or the task marks none
    extra: dict[str, Any] = field(default_factory=dict)  # column -> value, from log_extra
    length: int | None = None  # tokens


def answer_marks(cfg: Config, rewards: Sequence[Reward]) -> tuple[str, str] | None:
    """The texts between which an answer stands: those that a reward reads; else those that the prompt asks for.

    >>> answer_marks(Config(prompt_template="{question} Put it into <answer></answer>."), [])
    ('<answer>', '</answer>')
    """
    for reward in rewards:
        if reward.marks is not None:
            return reward.marks[0], reward.marks[1]
    prompt = f"{cfg.system_prompt or ''} {cfg.prompt_template} {cfg.example_answer or ''}"
    for tag in ("SOLUTION", "answer"):
        if f"<{tag}>" in prompt:
            return f"<{tag}>", f"</{tag}>"
    return ("####", "") if cfg.answer_format == "hash" or "####" in prompt else None


def first_of_all(world: World, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The first rows of the step, on rank 0; on others an empty list. A collective."""
    parts = _shared(world, [vars(rollout) for rollout in rollouts if rollout.row < NUM_SHOWN], [0])
    return sorted((Rollout(**one) for part in parts for one in part), key=lambda rollout: rollout.row)


def _shared(world: World, value: Any, to: Sequence[int]) -> list[Any]:
    """Every rank's value, on the ranks `to`; on others an empty list. As JSON, with two collectives."""
    data = np.frombuffer(json.dumps(value, default=str).encode(), np.uint8).astype(np.int32)
    sizes = world.gather_rows(np.array([len(data)]))[:, 0].astype(int).tolist()
    to_rank = [data if rank in to else data[:0] for rank in range(world.size)]
    parts = world.exchange(to_rank, sizes if world.rank in to else [0] * world.size)
    return [json.loads(part.astype(np.uint8).tobytes()) for part in parts if len(part)]


def user_metrics(world: World, rewards: Sequence[Reward], logs: Logs, prefix: str = "") -> dict[str, float]:
    """What reward functions logged by log_metric, averaged over all ranks; a collective where one of them may log."""
    if not any("log_metric" in reward.takes for reward in rewards):
        return {}
    return means(_shared(world, logs.sums(), range(world.size)), f"{prefix}user/")


def rollouts_of(
    step: int, scored: Scored, advantages: np.ndarray, cfg: Config, marks: tuple[str, str] | None = None
) -> list[Rollout]:
    """This rank's rollouts of a step, by row. advantages: [N], of all ranks. marks: see `answer_marks`."""
    totals = combine(scored.scores, list(cfg.rewards.values())) if len(scored.inputs) else np.zeros(0)
    rollouts = []
    for i, (completion, reward_input) in enumerate(zip(scored.completions, scored.inputs, strict=True)):
        question = reward_input.columns.get("question")
        text = completion_text(reward_input.completion)
        rollouts.append(
            Rollout(
                step=step,
                row=completion.row,
                question=question if isinstance(question, str) else completion_text(reward_input.prompt),
                gold=reward_input.columns.get("answer"),
                completion=text,
                finish=completion.finish,
                rewards={name: _none_if_nan(value) for name, value in zip(cfg.rewards, scored.scores[i], strict=True)},
                reward=_none_if_nan(totals[i]),
                advantage=float(advantages[completion.row]),
                extracted=inside(text, *marks) if marks else None,
                extra=scored.logs.columns.get(completion.row, {}),
                length=len(completion.token_ids),
            )
        )
    return sorted(rollouts, key=lambda rollout: rollout.row)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


class RolloutFile:
    """Appends one rank's rollouts. A resumed run first drops lines of steps after `done`. Raises OSError."""

    def __init__(self, folder: Path, rank: int, done: int, name: str = "rollouts"):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open_after(folder / f"{name}-rank{rank}.jsonl", done)

    def write(self, rollouts: Sequence[Rollout], **more: str) -> None:
        """Write one line per rollout, each with `more`; NaN, an answer's advantage, as null."""
        for rollout in rollouts:
            line = {name: value for name, value in vars(rollout).items() if name != "extra" or value} | more
            line["advantage"] = _none_if_nan(rollout.advantage)
            self.file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def forget_other_ranks(folder: Path, num_ranks: int, done: int) -> None:
    """Drop the lines after step `done` of ranks that a run had before and has no more. A disk error is a warning."""
    for path in folder.glob("*-rank*.jsonl"):
        rank = path.stem.rpartition("-rank")[2]
        if rank.isdecimal() and int(rank) >= num_ranks:
            try:
                drop_after(path, done)
            except OSError as error:
                warn(f"warning: {path} cannot be written ({error}); the page shows its steps twice")


def as_markdown(rollouts: Sequence[Rollout], language: str = "en", extracts: bool = False) -> str:
    """A few rollouts for a tracker. Model text is escaped: HTML is not rendered, line breaks are preserved."""
    text = partial(label, language)
    none = text("none")
    blocks = []
    for rollout in rollouts[:NUM_SHOWN]:
        rewards = ", ".join(f"{name} {_number(value, none)}" for name, value in rollout.rewards.items())
        texts = (
            f"**{text('question')}** {rollout.question}",
            f"**{text('completion')}** {rollout.completion}",
            (f"**{text('extracted')}** {_shown(rollout.extracted, none)}, " if extracts else "")
            + f"**{text('gold')}** {rollout.gold}, **{text('rewards')}** {rewards}, "
            f"**{text('sum')}** {_number(rollout.reward, none)}, "
            f"**{text('advantage')}** {rounded(rollout.advantage, 3):+.3f}",
            *([", ".join(f"**{name}** {value}" for name, value in rollout.extra.items())] if rollout.extra else []),
        )
        blocks.append("\n\n".join(map(_escape, texts)))
    return "\n\n---\n\n".join(blocks)


def as_table(rollouts: Sequence[Rollout], language: str = "en", extracts: bool = False) -> Table:
    """A few rollouts for the console. extracts: with the answers that were read from the completions."""
    text = partial(label, language)
    none = text("none")
    table = Table(title=text("completions", step=rollouts[0].step), show_lines=True)
    columns = {"question": 3, "completion": 5, "extracted": 1, "gold": 1, "rewards": 2, "advantage": 1}
    for name, ratio in columns.items():
        if name == "extracted" and not extracts:
            continue
        table.add_column(text(name), ratio=ratio, overflow="fold")
    logged = sorted({name for rollout in rollouts[:NUM_SHOWN] for name in rollout.extra})
    for name in logged:
        table.add_column(Text(_printable(name)), ratio=1, overflow="fold")
    for rollout in rollouts[:NUM_SHOWN]:
        names = short_names(list(rollout.rewards))
        rewards = [f"{names[name]} {_number(value, none)}" for name, value in rollout.rewards.items()]
        rewards.append(f"{text('sum')} {_number(rollout.reward, none)}")
        advantage = f"{rounded(rollout.advantage, 3):+.3f}"
        extracted = [_shown(rollout.extracted, none)] if extracts else []
        gold = str(rollout.gold)
        more = [str(rollout.extra.get(name, none)) for name in logged]
        cells = (rollout.question, rollout.completion, *extracted, gold, "\n".join(rewards), advantage, *more)
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    return table


def _shown(text: str | None, none: str) -> str:
    return none if text is None else text


def _number(value: float | None, none: str) -> str:
    return none if value is None else f"{value + 0.0:g}"


def _printable(text: str) -> str:
    """Replace control characters: a model's text must not control the terminal."""
    return printable(text if len(text) <= MAX_CELL_CHARACTERS else text[:MAX_CELL_CHARACTERS] + " …")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "  \n")
