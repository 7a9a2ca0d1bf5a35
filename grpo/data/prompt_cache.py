"""Prompts as text and tokens, made once: what was made is kept between launches, and looked at before it is used.

The name of a cache file is a hash of all that decides its content: every conversation, the chat template, the
tokenizer, the versions of the libraries. So a changed row, recipe or tokenizer is another file, and nothing is ever
out of date. The content is JSON behind its own hash; a file that was damaged or made by hand is made anew.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from grpo.data.recipe import Recipe
from grpo.errors import warn
from grpo.strict_json import check_regular, parse_json

MIN_ROWS = 64  # fewer are made faster than a file is worth
MAX_BYTES = 2**33
FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One row: its conversation, and its answer's cell where the length of that counts."""

    messages: list[dict[str, str]]
    answer: str | None = None


@dataclass(frozen=True)
class Made:
    """A row's prompt as text and token ids, and the tokens of its answer."""

    text: str
    token_ids: tuple[int, ...]
    answer_length: int | None = None


def make_all(
    jobs: Sequence[Job], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, make: Callable[[int], Made]
) -> list[Made]:
    """What `make` gives for every row, from the cache where it is there. `make` may raise UserError."""
    path = _file_of(jobs, recipe, tokenizer) if len(jobs) >= MIN_ROWS else None
    if path is not None and path.exists():
        try:
            return _read(path, len(jobs), len(tokenizer))
        except (OSError, ValueError, TypeError, KeyError) as error:
            _say(f"warning: {path} is not used ({' '.join(str(error).split())[:200]}): its prompts are made anew")
    with _progress(len(jobs)) as advance:
        made = []
        for row in range(len(jobs)):
            made.append(make(row))
            advance()
    if path is not None:
        _write(path, made)
    return made


def _file_of(jobs: Sequence[Job], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Where the result belongs; None for a tokenizer that cannot say all that it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    key = hashlib.sha256()
    facts: list[Any] = [FORMAT, transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
    facts += [recipe.chat, tokenizer.chat_template if recipe.chat else None, tokenizer.special_tokens_map]
    key.update(json.dumps(facts, default=str, sort_keys=True).encode())
    key.update(backend.to_str().encode())
    for job in jobs:
        key.update(json.dumps([job.messages, job.answer], sort_keys=True).encode() + b"\n")
    return Path(datasets.config.HF_DATASETS_CACHE) / "grpo_prompts" / f"{key.hexdigest()}.jsonl"


def _read(path: Path, rows: int, vocabulary: int) -> list[Made]:
    """A cache file, looked at. Raises OSError, ValueError, TypeError or KeyError."""
    if path.is_symlink():
        raise ValueError("it is a link")
    check_regular(path, MAX_BYTES)
    head, _, body = path.read_bytes().partition(b"\n")
    described = parse_json(head)
    if not isinstance(described, dict) or described.get("sha256") != hashlib.sha256(body).hexdigest():
        raise ValueError("its content is not what it was")
    made = [_checked(parse_json(line), vocabulary) for line in body.splitlines()]
    if len(made) != rows:
        raise ValueError(f"it holds {len(made)} prompts, not {rows}")
    return made


def _checked(row: Any, vocabulary: int) -> Made:
    text, ids, length = row
    if not isinstance(text, str) or not isinstance(ids, list) or not ids:
        raise ValueError("a row holds no prompt")
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"a row holds tokens outside 0 to {vocabulary - 1}")
    if length is not None and (type(length) is not int or length < 0):
        raise ValueError("a row holds no length")
    return Made(text, tuple(ids), length)


def _write(path: Path, made: Sequence[Made]) -> None:
    """Keep the result: whole or not at all. A disk that refuses costs the next launch some time, and one line."""
    body = b"".join(json.dumps([one.text, one.token_ids, one.answer_length]).encode() + b"\n" for one in made)
    head = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(head + b"\n" + body)
        aside.replace(path)
    except OSError as error:
        _say(f"note: the prompts are not kept for the next launch: {path} cannot be written ({error.strerror})")


def _say(line: str) -> None:
    """A line from one rank: all of them read the same file."""
    if os.environ.get("RANK", "0") == "0":
        warn(line)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on rank 0's terminal, gone when it is done; elsewhere nothing."""
    console = Console(highlight=False)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield lambda: None
        return
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("prompts", total=total)
        yield lambda: progress.advance(task)
