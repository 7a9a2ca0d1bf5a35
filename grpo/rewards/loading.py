"""Finding reward functions, in the trainer: names to files, files to text, descriptions to rewards."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.config.names import find_path
from grpo.config.settings import PROJECT, Config
from grpo.errors import UserError
from grpo.rewards import Reward
from grpo.rewards.neighbours import texts_beside


def locate(cfg: Config) -> list[dict[str, Any]]:
    """For each reward its file, the file's text, and its parameters. Raises UserError.

    The file is reward_func.py, or that of `path.py:function`. `function@label` is the function, under another name.
    """
    texts: dict[Path, str] = {}
    modules: dict[Path, str] = {}  # by file; two files of one name are two modules
    functions = []
    for name in cfg.rewards:
        file, _, labelled = name.rpartition(":")
        function, at, label = labelled.partition("@")
        if at and not re.fullmatch(r"[\w-]{1,40}", label):
            raise UserError(
                f"rewards: {name[:80]!r}: behind @ stands a label that tells several uses of one function apart, of "
                "letters, digits, _ and -, such as model_reward@helpful."
            )
        path = find_path(file) if file else find_path("reward_func.py")
        if path is None or not path.is_file():
            raise UserError(f"rewards: no such file {file!r} in {name!r}. Write path/to/file.py:function.")
        path = path.resolve()
        if path not in texts:
            texts[path] = _read(path)
            module = "reward_func" if path == PROJECT / "reward_func.py" else f"rewards_from_{path.stem}"
            taken = sum(other.stem == path.stem for other in modules)
            modules[path] = f"{module}_{taken + 1}" if taken else module
        given = cfg.reward_parameters.get(name, {})
        parameters = {key: _with_path(name, key, value) for key, value in given.items()}
        functions.append(
            {
                "name": name,
                "path": str(path),
                "function": function,
                "module": modules[path],
                "text": texts[path],
                "beside": texts_beside(path, texts[path], _read),
                "parameters": parameters,
            }
        )
    return functions


def _with_path(name: str, key: str, value: Any) -> Any:
    """A parameter's value; where its name ends in file or folder, the absolute path. Raises UserError."""
    if not isinstance(value, str) or not key.endswith(("file", "folder")):
        return value
    path = find_path(value)
    if path is None:
        raise UserError(
            f"reward_parameters: {name}: {key}: no such path {value[:200]!r}. Give one that exists, from here or from "
            "the project's folder."
        )
    return str(path.resolve())


def _read(path: Path) -> str:
    if path.suffix != ".py":
        raise UserError(f"rewards: {path} is not a Python file. Write path/to/file.py:function.")
    try:
        return importlib.util.decode_source(path.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"rewards: {path} cannot be read: {error}. Give a Python file that can.") from None


def make_rewards(cfg: Config, descriptions: Sequence[dict[str, Any]]) -> list[Reward]:
    """Rewards from a worker's descriptions of the functions. Raises UserError for one not found or not importable."""
    if descriptions and "error" in descriptions[-1]:
        raise UserError(f"rewards: {descriptions[-1]['error']}")
    rewards = [
        Reward(name, weight, **one) for (name, weight), one in zip(cfg.rewards.items(), descriptions, strict=True)
    ]
    grouped = [reward.name for reward in rewards if reward.sees_group]
    size = max(cfg.num_generations, cfg.eval_generations)
    if grouped and cfg.rollout_chunk_rows < size:
        raise UserError(
            f"rollout_chunk_rows: {grouped[0]} sees whole groups of {size}, a chunk must hold one, got "
            f"{cfg.rollout_chunk_rows}. Raise it to {size} at least."
        )
    return rewards
