"""The held-out sets of a run: one without a name, or several by name (setting `eval_data`)."""

import dataclasses
import re

from grpo.config.settings import Config
from grpo.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,59}")  # of a set; it is part of the names of its metrics


def eval_sets(cfg: Config) -> dict[str, Config]:
    """The held-out sets in their order, each as the settings of a run that has this one alone.

    The only set, or the part of data that eval_split_size takes, is called "".

    >>> [(name, one.eval_data) for name, one in eval_sets(Config(eval_data={"a": "x.csv", "b": "y.csv"})).items()]
    [('a', 'x.csv'), ('b', 'y.csv')]
    >>> list(eval_sets(Config(eval_data="x.csv"))), list(eval_sets(Config()))
    ([''], [])
    """
    if isinstance(cfg.eval_data, dict):
        return {name: dataclasses.replace(cfg, eval_data=path) for name, path in cfg.eval_data.items()}
    return {"": cfg} if cfg.eval_data or cfg.eval_split_size else {}


def eval_tag(name: str, metric: str) -> str:
    """A metric's name, `eval/accuracy`, in the set of this name.

    >>> eval_tag("", "eval/accuracy"), eval_tag("test-1", "eval/accuracy")
    ('eval/accuracy', 'eval/test-1/accuracy')
    """
    return metric.replace("eval/", f"eval/{name}/", 1) if name else metric


def metrics_of_set(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of one set, without its name; the reverse of `eval_tag`.

    >>> metrics_of_set("test-1", {"eval/test-1/accuracy": 0.5, "eval/test-2/accuracy": 0.25})
    {'eval/accuracy': 0.5}
    """
    start = eval_tag(name, "eval/")
    return {f"eval/{tag.removeprefix(start)}": value for tag, value in metrics.items() if tag.startswith(start)}


def check_eval_data(cfg: Config) -> None:
    """Check the names of several sets. Raises UserError."""
    if not isinstance(cfg.eval_data, dict):
        return
    if not cfg.eval_data:
        raise UserError("eval_data: it names no set. Write {name: file}, one file, or null.")
    for name, path in cfg.eval_data.items():
        if not NAME.fullmatch(name):
            raise UserError(
                f"eval_data: a set's name is made of letters, digits, _, . and -, 60 at most, got {ascii(name)[:80]}. "
                "Give it another name."
            )
        if not path.strip() or "\0" in path:
            raise UserError(f"eval_data: {name}: must be a file, a folder or a hub name, got {ascii(path)[:60]}.")
    if len(set(cfg.eval_data.values())) < len(cfg.eval_data):
        raise UserError(f"eval_data: two names stand for the same questions, got {cfg.eval_data}. Keep one of them.")
