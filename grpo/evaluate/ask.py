"""A checkpoint, loaded and ready to be asked: its own recipe puts the question, our engine answers.

inference.py asks it one question at a time; multiple_choice.py and command.py ask many, on one rank or several.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from grpo.data.recipe import Recipe, build, encode, load_recipe, render
from grpo.errors import UserError
from grpo.evaluate.stream import TokenPrinter
from grpo.models.checks import check_lengths, check_vocabulary, load_model, max_positions, stop_token_ids
from grpo.models.loading import load_tokenizer
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import World

BLOCK_CHUNKS = 8  # chunks that are cut together, longest prompts first; fixed, so that no row depends on the ranks


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said."""

    text: str
    finish: str  # stop, length or error
    num_tokens: int


class CheckpointModel:
    """A checkpoint on one device. Raises UserError when its parts do not fit."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        sampling: dict[str, Any],
        max_new_tokens: int | None = None,
        seed: int = 0,
        dtype: str = "fp32",
    ):
        """`sampling`: what Sampling takes; the recipe's logit clamp is added. max_new_tokens None: as in training."""
        self.recipe: Recipe = load_recipe(folder / "trainer" / "recipe.json")
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(folder))
        model = load_model(str(folder), device)
        self.max_new_tokens = max_new_tokens or self.recipe.max_generate_length
        check_lengths(model, self.recipe.max_prompt_length, self.max_new_tokens)
        check_vocabulary(model, self.tokenizer)
        self.engine = NativeEngine(model, stop_token_ids(model, self.tokenizer), self.max_new_tokens, seed, dtype)
        self.sampling = Sampling(**sampling, logit_clamp=self.recipe.logit_clamp)

    def text_of(self, question: str, columns: dict[str, Any]) -> str:
        """The exact prompt of a question; `columns` fill the recipe's other {names}."""
        return render(self.recipe, build(self.recipe, question, columns), self.tokenizer)

    def put(self, question: str, columns: dict[str, Any] | None = None) -> tuple[int, ...]:
        """The question as token ids. Raises UserError for one that is empty, too long, or no text."""
        if not question.strip():
            raise UserError("question: it is empty. Ask something.")
        ids = tuple(encode(self.recipe, self.text_of(question, columns or {}), self.tokenizer))
        if not ids:
            raise UserError("question: the tokenizer makes no token of it. Ask something else.")
        if len(ids) > self.recipe.max_prompt_length:
            raise UserError(
                f"question: {len(ids)} tokens, the checkpoint was trained for at most "
                f"{self.recipe.max_prompt_length} (max_prompt_length). Shorten it."
            )
        return ids

    def ask(self, ids: tuple[int, ...], on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer one question, given as what `put` made of it."""
        printer = None if on_text is None else TokenPrinter(self.tokenizer, on_text)
        [completion] = self.engine.generate([Request(0, 0, 0, ids)], self.sampling, on_tokens=printer)
        return self._answer(completion.token_ids, completion.finish)

    def answer_all(
        self, prompts: Sequence[tuple[int, ...]], samples: int, batch_rows: int, world: World
    ) -> Iterator[list[tuple[int, list[Answer]]]]:
        """Answers to all prompts, `samples` each, shared over ranks: (index, answers) in order, a wave at a time.

        Rank 0 gets them, the other ranks empty lists. What is decoded together depends on the prompts and
        `batch_rows` alone, so every row is the same on any number of ranks. Every rank must take every wave.
        """
        block = max(1, batch_rows // samples) * BLOCK_CHUNKS
        wave = block * -(-2 * world.size // BLOCK_CHUNKS)  # two chunks or more for every rank
        for start in range(0, len(prompts), wave):
            stop = min(start + wave, len(prompts))
            chunks = [
                chunk
                for first in range(start, stop, block)
                for chunk in self._chunks(prompts, range(first, min(first + block, stop)), samples, batch_rows)
            ]
            yield self._wave(chunks, range(start, stop), samples, world)

    @staticmethod
    def _chunks(
        prompts: Sequence[tuple[int, ...]], indices: range, samples: int, batch_rows: int
    ) -> list[list[Request]]:
        """A block's requests, longest prompts first, so that neighbours are alike in length."""
        order = sorted(indices, key=lambda i: (-len(prompts[i]), i))
        requests = [Request(i * samples + g, i, g, prompts[i]) for i in order for g in range(samples)]
        return [requests[at : at + batch_rows] for at in range(0, len(requests), batch_rows)]

    def _wave(
        self, chunks: list[list[Request]], indices: range, samples: int, world: World
    ) -> list[tuple[int, list[Answer]]]:
        first, num_rows = indices.start * samples, len(indices) * samples
        table = np.zeros((num_rows, 4))  # tokens, finish, rank, done
        said: dict[int, np.ndarray] = {}
        finishes = ("stop", "length", "error")
        for chunk in (chunks[i] for i in world.deal(len(chunks))):
            for done in self.engine.generate(chunk, self.sampling):
                said[done.row - first] = done.token_ids
                table[done.row - first] = len(done.token_ids), finishes.index(done.finish), world.rank, 1
        table = world.sum_rows(table)
        assert table[:, 3].all()
        lengths, owners = table[:, 0].astype(int), table[:, 2].astype(int)
        mine = [np.concatenate([np.zeros(0, np.int32), *(said[row] for row in sorted(said))])]
        nothing = np.zeros(0, np.int32)
        sizes = [int(lengths[owners == rank].sum()) if world.is_main else 0 for rank in range(world.size)]
        received = world.exchange(mine + [nothing] * (world.size - 1), sizes)
        if not world.is_main:
            return []
        answers: dict[int, Answer] = {}
        for rank, tokens in enumerate(received):
            rows = np.flatnonzero(owners == rank)
            for row, ids in zip(rows, np.split(tokens, np.cumsum(lengths[rows])[:-1]), strict=bool(len(rows))):
                answers[int(row)] = self._answer(ids, finishes[int(table[row, 1])])
        return [(i, [answers[i * samples + g - first] for g in range(samples)]) for i in indices]

    def _answer(self, token_ids: np.ndarray, finish: str) -> Answer:
        text = str(self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
        return Answer(text, finish, len(token_ids))


class OtherModel:
    """Another model, asked with a checkpoint's recipe: the same text, in this model's own tokens."""

    def __init__(self, name: str, like: CheckpointModel, device: torch.device, seed: int = 0):
        """`name`: a folder or a hub name. Raises UserError when it cannot be loaded."""
        self.name, self.like = name, like
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)
        model = load_model(name, device)
        check_vocabulary(model, self.tokenizer)
        self.positions = max_positions(model)
        self.engine = NativeEngine(model, stop_token_ids(model, self.tokenizer), like.max_new_tokens, seed)

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer the question as the checkpoint would be asked it. Raises UserError when it is too long."""
        ids = encode(self.like.recipe, self.like.text_of(question, {}), self.tokenizer)
        if self.positions is not None and len(ids) + self.like.max_new_tokens > self.positions:
            raise UserError(
                f"compare: {self.name} has {self.positions} positions, the question needs {len(ids)} and its answer "
                f"{self.like.max_new_tokens}. Lower --max_new_tokens."
            )
        printer = None if on_text is None else TokenPrinter(self.tokenizer, on_text)
        request = Request(0, 0, 0, tuple(ids))
        [completion] = self.engine.generate([request], self.like.sampling, on_tokens=printer)
        text = str(self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True))
        return Answer(text, completion.finish, len(completion.token_ids))
