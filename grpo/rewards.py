"""Rewards: loading the user's functions, calling them, weighing what they say.

A function is called with one completion (lists of length 1), or, when marked `sees_group`, with one whole
group in sample order; never with whatever a rank happens to hold. So a score cannot depend on the number
of processes.

    reward of a row = sum of weight * score over the functions that apply (score not None)

A row to which none applies has no reward (NaN here), takes no part in its group's statistics and gets
advantage 0. A call that raises, or returns something that is no finite number, counts as a failure: its
score is None, the function's name and the sample are reported, and too many failures stop the run.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from grpo.config import PROJECT, Config, find_path
from grpo.errors import UserError

RewardFunction = Callable[..., Sequence[float | None]]
NO_SCORE = float("nan")


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as a string or as a list of messages (its last one counts).

    >>> completion_text([{"role": "assistant", "content": "4"}])
    '4'
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class Sample:
    """One completion as rewards see it."""

    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    token_ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Reward:
    """A named reward function and its weight."""

    name: str
    weight: float
    function: RewardFunction

    @property
    def sees_group(self) -> bool:
        """Whether it is called with a whole group at once."""
        return bool(getattr(self.function, "sees_group", False))


@dataclass(frozen=True)
class Failure:
    """A call that gave no usable score."""

    name: str
    reason: str
    sample: Sample

    def __str__(self) -> str:
        text = " ".join(completion_text(self.sample.completion).split())
        return f"reward {self.name} failed: {self.reason}; completion: {text[:200]!r}"


def load_rewards(cfg: Config) -> list[Reward]:
    """Find every function by name: in reward_func.py, or `path.py:function`. Raises UserError."""
    rewards = [Reward(name, weight, _find(name)) for name, weight in cfg.rewards.items()]
    seeing = [reward.name for reward in rewards if reward.sees_group]
    if seeing and cfg.rollout_chunk_rows < cfg.num_generations:
        raise UserError(
            f"rollout_chunk_rows: {seeing[0]} sees whole groups of {cfg.num_generations}, a chunk must hold one, got "
            f"{cfg.rollout_chunk_rows}. Raise it to {cfg.num_generations} at least."
        )
    return rewards


def _find(name: str) -> RewardFunction:
    file, _, function = name.rpartition(":")
    path = find_path(file) if file else find_path("reward_func.py")
    if path is None:
        raise UserError(f"rewards: no such file {file!r} in {name!r}. Write path/to/file.py:function.")
    module = _import(path)
    found = getattr(module, function, None)
    if not callable(found):
        names = sorted(n for n, value in vars(module).items() if n.endswith("reward") and callable(value))
        raise UserError(f"rewards: {path.name} has no function {function!r}. It has: {', '.join(names)}.")
    return found


def _import(path: Path) -> ModuleType:
    name = "reward_func" if path.resolve() == PROJECT / "reward_func.py" else f"rewards_from_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"rewards: {path} is not a Python file. Write path/to/file.py:function.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises at import
        del sys.modules[name]
        raise UserError(f"rewards: importing {path} raised {type(error).__name__}: {error}.") from None
    return module


def call(reward: Reward, samples: Sequence[Sample]) -> tuple[list[float], list[Failure]]:
    """Score samples in one call: a float each, NaN for None and for failures."""
    columns = {key: [sample.columns[key] for sample in samples] for key in samples[0].columns}
    columns.pop("prompts", None)
    columns.pop("completions", None)
    try:
        scores = reward.function(
            prompts=[sample.prompt for sample in samples],
            completions=[sample.completion for sample in samples],
            **{**columns, "completion_ids": [sample.token_ids for sample in samples]},
        )
    except Exception as error:  # a user's function may raise anything; the run decides, not the exception
        return _all_failed(reward, samples, f"{type(error).__name__}: {error}")
    if isinstance(scores, (str, bytes)) or not isinstance(scores, (list, tuple, np.ndarray)):
        return _all_failed(reward, samples, f"returned {type(scores).__name__}, expected a list of numbers or None")
    if len(scores) != len(samples):
        return _all_failed(reward, samples, f"returned {len(scores)} scores for {len(samples)} completions")
    values, failures = [], []
    for score, sample in zip(scores, samples, strict=True):
        value = NO_SCORE
        if score is not None:
            try:
                value = float(score)
            except (TypeError, ValueError):
                failures.append(Failure(reward.name, f"returned {score!r}, expected a number or None", sample))
            else:
                if not math.isfinite(value):
                    failures.append(Failure(reward.name, f"returned {value}, expected a finite number", sample))
                    value = NO_SCORE
        values.append(value)
    return values, failures


def _all_failed(reward: Reward, samples: Sequence[Sample], reason: str) -> tuple[list[float], list[Failure]]:
    return [NO_SCORE] * len(samples), [Failure(reward.name, reason, sample) for sample in samples]


def combine(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[N, K] scores, NaN where a function does not apply -> [N] rewards, NaN where none applies.

    >>> combine(np.array([[1.0, np.nan], [np.nan, np.nan]]), [0.5, 1.0]).tolist()
    [0.5, nan]
    """
    applies = ~np.isnan(scores)
    total = (np.where(applies, scores, 0.0) * np.asarray(weights)).sum(-1)
    return np.where(applies.any(-1), total, NO_SCORE)
