"""Figures of single tokens for a sample of rows: runs/<name>/tokens-rank<R>.jsonl, shown by `python -m grpo.view`.

Every `log_tokens_steps` steps, of `MAX_ROWS` rows of the step, one line from the rank that sampled a row and
one from the rank that trained on it; lists have one entry a token, log-probs are in nats:

    {"step", "row", "ids", "texts", "logprob": as sampled, "trained": "1101..", 1: carries loss}
    {"step", "row", "policy": log-prob in the row's first update, "ratio": policy / old in its last, "entropy"}

`ratio` is left out where the old log-probs are the update's own (it is 1), `entropy` where no setting measures it, the
second line for rows without gradient.

During the step nothing is copied and nothing waits for the device: tensors [B, T] that exist anyway are kept until the
step is over. A thread writes. When a rank's file is larger than its share of `log_tokens_mb`, every second step of its
older half goes, until a quarter of the share is free.
"""

import json
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config, prompts_per_step
from grpo.errors import warn
from grpo.run.trackers.jsonl import open_after
from grpo.types import Completion, MicroBatch

MAX_ROWS = 16  # of a step: whole groups, spread over it
MAX_WAITING = 8  # steps that the thread may be behind; more are dropped
KEPT_SHARE = 0.75  # of the limit, after thinning
PART_OF_CHARACTER = "\ufffd"  # what decoding gives for bytes that are no whole character


@dataclass
class Seen:
    """What the updates of a step computed for one row: views of tensors that exist anyway."""

    length: Tensor  # [] tokens of its completion
    first: Tensor  # [T] log-probs in the step's first update
    last: Tensor  # [T] in the last one
    old: Tensor | None  # [T]; None: the update's own
    entropy: Tensor | None  # [T]


class TokenTexts:
    """The text of each token. Bytes of one character that are several tokens: the text is with the last of them.

    A token is decoded after another one, because some tokenizers drop the space at the beginning of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before = tokenizer.encode("x", add_special_tokens=False)[-1:]
        self.start = self._decode(self.before)
        self.known: dict[int, str] = {}

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _after(self, ids: Sequence[int]) -> str:
        text = self._decode([*self.before, *ids])
        return text[len(self.start) :] if text.startswith(self.start) else self._decode(ids)

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text an id; together they are the decoded text."""
        texts: list[str] = []
        open_ids: list[int] = []  # tokens that began a character which is not whole yet
        for token in ids:
            if not open_ids:
                if token not in self.known:
                    self.known[token] = self._after([token])
                text = self.known[token]
            else:
                text = self._after([*open_ids, token])
            if text.endswith(PART_OF_CHARACTER) and len(open_ids) < 3:
                open_ids.append(token)
                texts.append("")
            else:
                open_ids = []
                texts.append(text)
        if open_ids:
            texts[-1] = PART_OF_CHARACTER
        return texts


def rounded_list(values: Any) -> list[float | None]:
    """Values with three digits behind the point; None for what is not finite."""
    return [round(value, 3) + 0.0 if np.isfinite(value) else None for value in np.asarray(values, np.float64).tolist()]


def sampled_rows(prompts: int, generations: int) -> frozenset[int]:
    """Row numbers of the groups that are looked at: the first, the last, and others between; of a large group a part.

    >>> sorted(sampled_rows(4, 8)), sorted(sampled_rows(1, 2)), len(sampled_rows(9, 64))
    ([0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31], [0, 1], 16)
    """
    count = min(prompts, max(1, MAX_ROWS // generations))
    groups = [round(place) for place in np.linspace(0, prompts - 1, count)]
    size = min(generations, MAX_ROWS)
    return frozenset(group * generations + g for group in groups for g in range(size))


class TokensLog:
    """The figures that one rank writes. Without `log_tokens_steps` every method returns at once."""

    def __init__(self, cfg: Config, folder: Path, rank: int, world_size: int, done: int, texts: TokenTexts | None):
        """done: finished steps; lines of later ones, which an interrupted run wrote, are dropped."""
        self.every = cfg.log_tokens_steps if texts is not None else 0
        self.rows = sampled_rows(prompts_per_step(cfg), cfg.num_generations)
        self.limit = int(cfg.log_tokens_mb * 1e6 / world_size)
        self.path = folder / f"tokens-rank{rank}.jsonl"
        self.done = done
        self.texts = texts
        self.step: int | None = None  # the step that is being observed
        self.seen: dict[int, Seen] = {}
        self.waiting: queue.Queue[list[dict[str, Any]] | None] = queue.Queue(MAX_WAITING)
        self.thread: threading.Thread | None = None
        self.failed = False

    def begin(self, step: int) -> None:
        """A step begins, counted from 1."""
        self.seen = {}
        self.step = step if self.every and (step == 1 or step % self.every == 0) and not self.failed else None

    def observe(self, micro: MicroBatch, logprobs: Tensor, entropy: Tensor | None) -> None:
        """Keep what an update computed for the sampled rows of a micro-batch. logprobs, entropy: [B, T]."""
        if self.step is None:
            return
        for line, row in enumerate(micro.rows):
            if row not in self.rows:
                continue
            last = logprobs.detach()[line]
            old, entropy_of = (None if part is None else part.detach()[line] for part in (micro.old_logprobs, entropy))
            first = self.seen[row].first if row in self.seen else last
            self.seen[row] = Seen(micro.lengths[line], first, last, old, entropy_of)

    def write(self, step: int, completions: Sequence[Completion]) -> None:
        """After a step: hand the figures of this rank's rows to the thread. completions: those that it sampled."""
        if self.step != step or self.texts is None:
            return
        lines = [_sampled(step, one, self.texts) for one in completions if one.row in self.rows]
        lines += [_updated(step, row, seen) for row, seen in sorted(self.seen.items())]
        self.seen, self.step = {}, None
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="tokens log", daemon=True)
            self.thread.start()
        try:
            self.waiting.put_nowait(lines)
        except queue.Full:
            warn(f"warning: step {step}: the figures of its tokens are left out: {self.path} is written too slowly")

    def close(self) -> None:
        """Write what is waiting."""
        if self.thread is not None:
            self.waiting.put(None)
            self.thread.join()
            self.thread = None

    def _work(self) -> None:
        """The thread: append lines, thin the file. A disk error ends this log and not the run."""
        try:
            steps = Steps(self.path, self.done, self.limit)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:  # or lines that it did not write
            self._fail(error)
        while (lines := self.waiting.get()) is not None:
            if self.failed:
                continue
            try:
                steps.append(lines)
            except OSError as error:
                self._fail(error)
        if not self.failed:
            steps.file.close()

    def _fail(self, error: Exception) -> None:
        self.failed = True
        warn(f"warning: no figures of tokens in {self.path} from now on ({error})")


def _sampled(step: int, one: Completion, texts: TokenTexts) -> dict[str, Any]:
    ids = one.token_ids.tolist()
    trained = "".join("1" if flag else "0" for flag in one.trained.tolist())
    known = {"step": step, "row": one.row, "ids": ids, "texts": texts.of(ids)}
    return {**known, "logprob": one.sampler_logprobs.copy(), "trained": trained}


def _updated(step: int, row: int, seen: Seen) -> dict[str, Any]:
    """Figures of the updates, copied to the CPU: the step is over, so the copy waits for no work."""
    length = int(seen.length)
    first, last = (part[:length].float().cpu().numpy() for part in (seen.first, seen.last))
    line: dict[str, Any] = {"step": step, "row": row, "policy": first}
    if seen.old is not None:
        gap = last.astype(np.float64) - seen.old[:length].double().cpu().numpy()
        line["ratio"] = np.exp(np.clip(gap, -20, 20))
    if seen.entropy is not None:
        line["entropy"] = seen.entropy[:length].float().cpu().numpy()
    return line


class Steps:
    """The file, and how many bytes each step has in it."""

    def __init__(self, path: Path, done: int, limit: int):
        """Raises OSError."""
        self.path, self.limit = path, limit
        self.file = open_after(path, done)
        self.sizes: dict[int, int] = {}
        for line in path.read_bytes().splitlines(keepends=True):
            step = json.loads(line)["step"]
            self.sizes[step] = self.sizes.get(step, 0) + len(line)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines of a step. Raises OSError."""
        for line in lines:
            plain = {name: _plain(value) for name, value in line.items()}
            text = json.dumps(plain, ensure_ascii=False, separators=(",", ":")) + "\n"
            self.file.write(text)
            size = len(text.encode("utf-8", "backslashreplace"))
            self.sizes[line["step"]] = self.sizes.get(line["step"], 0) + size
        self.file.flush()
        if sum(self.sizes.values()) > self.limit:
            self._thin()

    def _thin(self) -> None:
        """Drop every second step of the older half, again and again until enough is free; the newest goes last."""
        kept = sorted(self.sizes)
        while kept and sum(self.sizes[step] for step in kept) > KEPT_SHARE * self.limit:
            older = kept[: max(1, len(kept) // 2)]
            dropped = set(older[1::2] or older)
            kept = [step for step in kept if step not in dropped]
        self.file.close()
        new = self.path.with_suffix(".new")
        with self.path.open("rb") as old, new.open("wb") as file:
            file.writelines(line for line in old if json.loads(line)["step"] in set(kept))
        os.replace(new, self.path)
        self.file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        self.sizes = {step: self.sizes[step] for step in kept}


def _plain(value: Any) -> Any:
    return rounded_list(value) if isinstance(value, np.ndarray) else value
