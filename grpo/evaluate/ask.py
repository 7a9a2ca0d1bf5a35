"""A loaded checkpoint that answers questions: its own recipe builds the prompt, the native engine samples.

inference.py asks one question at a time; multiple_choice.py and command.py ask many, on one rank or several.
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
from grpo.rollout.stop_strings import StopStrings
from grpo.runtime.distributed import World

BLOCK_CHUNKS = 8  # chunks cut from one block of sorted prompts; constant, so that no row depends on the ranks
FIRST_SLOT = 2**62  # of evaluations: those of training count from 0 (grpo/randomness.py)
FINISHES = ("stop", "length", "error")


@dataclass(frozen=True)
class Answer:
    """The text of a completion, without special tokens."""

    text: str
    finish: str  # stop, length or error
    num_tokens: int


def _answer(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray, finish: str) -> Answer:
    text = str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
    return Answer(text, finish, len(token_ids))


def _ask(
    engine: NativeEngine | Any,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    ids: tuple[int, ...],
    on_text: Callable[[str], None] | None,
) -> Answer:
    """Sample one completion; `on_text` gets its text piece by piece while it is sampled."""
    printer = None if on_text is None else TokenPrinter(tokenizer, on_text)
    more: dict[str, Any] = {} if printer is None else {"on_tokens": printer}
    [completion] = engine.generate([Request(0, 0, 0, ids)], sampling, **more)
    return _answer(tokenizer, completion.token_ids, completion.finish)


class CheckpointModel:
    """A checkpoint on one device. Raises UserError when its parts do not fit together."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        sampling: dict[str, Any],
        max_new_tokens: int | None = None,
        seed: int = 0,
        dtype: str = "fp32",
        weights: str | None = None,
    ):
        """sampling: arguments of Sampling, without the recipe's logit clamp. max_new_tokens: None as in training.

        weights: another model, which is asked in place of the checkpoint's and just as that is.
        """
        self.recipe: Recipe = load_recipe(folder / "trainer" / "recipe.json")
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(folder))
        model = load_model(weights or str(folder), device)
        self.max_new_tokens = max_new_tokens or self.recipe.max_generate_length
        check_lengths(model, self.recipe.max_prompt_length, self.max_new_tokens)
        num_tokens = check_vocabulary(model, self.tokenizer, self.recipe.rules)
        stop_ids = stop_token_ids(model, self.tokenizer, self.recipe.end_of_turn)
        stop_strings = StopStrings.of(self.tokenizer, self.recipe.stop)
        self.engine: NativeEngine | Any = NativeEngine(  # or another (on_servers.py)
            model, stop_ids, self.max_new_tokens, seed, dtype, num_tokens=num_tokens, stop_strings=stop_strings
        )
        self.sampling = Sampling(**sampling, logit_clamp=self.recipe.logit_clamp)

    def text_of(self, question: str, columns: dict[str, Any]) -> str:
        """The exact prompt of a question; `columns` fill the recipe's other {names}."""
        return render(self.recipe, build(self.recipe, question, columns), self.tokenizer)

    def encode(self, question: str, columns: dict[str, Any] | None = None) -> tuple[int, ...]:
        """The prompt of a question as token ids. Raises UserError for a question that is empty or too long."""
        if not question.strip():
            raise UserError("question: it is empty. Ask something.")
        ids = tuple(encode(self.recipe, self.text_of(question, columns or {}), self.tokenizer))
        if not ids:
            raise UserError("question: its prompt has no tokens. Ask something else.")
        if len(ids) > self.recipe.max_prompt_length:
            raise UserError(
                f"question: {len(ids)} tokens, the checkpoint was trained for at most "
                f"{self.recipe.max_prompt_length} (max_prompt_length). Shorten it."
            )
        return ids

    def ask(self, ids: tuple[int, ...], on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer one question, given as the token ids of `encode`."""
        return _ask(self.engine, self.tokenizer, self.sampling, ids, on_text)

    def answer_all(
        self, prompts: Sequence[tuple[int, ...]], completions_per_question: int, batch_rows: int, world: World
    ) -> Iterator[list[tuple[int, list[Answer]]]]:
        """Answers to all prompts, sampled on all ranks: yields lists of (index, answers) in the order of the prompts.

        Rank 0 gets them, the other ranks empty lists. Which rows are decoded together depends only on the prompts and
        `batch_rows`, so every row is the same on any number of ranks. Every rank must exhaust the iterator.
        """
        block = max(1, batch_rows // completions_per_question) * BLOCK_CHUNKS  # prompts
        portion = block * -(-2 * world.size // BLOCK_CHUNKS)  # prompts in one list: at least two chunks for every rank
        for start in range(0, len(prompts), portion):
            stop = min(start + portion, len(prompts))
            chunks: list[list[Request]] = []
            for first in range(start, stop, block):
                indices = range(first, min(first + block, stop))
                chunks += _chunks_of(prompts, indices, completions_per_question, batch_rows)
            yield self._answer_portion(chunks, range(start, stop), completions_per_question, world)

    def _answer_portion(
        self, chunks: list[list[Request]], indices: range, num_each: int, world: World
    ) -> list[tuple[int, list[Answer]]]:
        first, num_rows = indices.start * num_each, len(indices) * num_each
        table = np.zeros((num_rows, 4))  # tokens, finish, rank, done
        # sample this rank's chunks
        own_tokens: dict[int, np.ndarray] = {}
        for chunk in (chunks[i] for i in world.deal(len(chunks))):
            for done in self.engine.generate(chunk, self.sampling):
                own_tokens[done.row - first] = done.token_ids
                table[done.row - first] = len(done.token_ids), FINISHES.index(done.finish), world.rank, 1
        table = world.sum_rows(table)
        assert table[:, 3].all()
        # send all tokens to rank 0, each rank's in the order of its rows
        lengths, owners = table[:, 0].astype(int), table[:, 2].astype(int)
        nothing = np.zeros(0, np.int32)
        sent = np.concatenate([nothing, *(own_tokens[row] for row in sorted(own_tokens))])
        sizes = [int(lengths[owners == rank].sum()) if world.is_main else 0 for rank in range(world.size)]
        received = world.exchange([sent] + [nothing] * (world.size - 1), sizes)
        if not world.is_main:
            return []
        # cut what each rank sent into rows
        answers: dict[int, Answer] = {}
        for rank, tokens in enumerate(received):
            rows = np.flatnonzero(owners == rank)
            for row, ids in zip(rows, np.split(tokens, np.cumsum(lengths[rows])[:-1]), strict=bool(len(rows))):
                answers[int(row)] = _answer(self.tokenizer, ids, FINISHES[int(table[row, 1])])
        return [(i, [answers[i * num_each + g - first] for g in range(num_each)]) for i in indices]


def _chunks_of(
    prompts: Sequence[tuple[int, ...]], indices: range, num_each: int, batch_rows: int
) -> list[list[Request]]:
    """The requests of a block, longest prompts first, so that a chunk's prompts have similar lengths."""
    order = sorted(indices, key=lambda i: (-len(prompts[i]), i))
    requests = [Request(i * num_each + g, FIRST_SLOT + i, g, prompts[i]) for i in order for g in range(num_each)]
    return [requests[at : at + batch_rows] for at in range(0, len(requests), batch_rows)]


class OtherModel:
    """Another model, asked with a checkpoint's recipe: the same prompt text, in this model's tokens."""

    def __init__(self, name: str, like: CheckpointModel, device: torch.device, seed: int = 0):
        """name: a folder or a hub name. Raises UserError when it cannot be loaded."""
        self.name, self.like = name, like
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)
        model = load_model(name, device)
        num_tokens = check_vocabulary(model, self.tokenizer, like.recipe.rules)
        self.positions = max_positions(model)
        stop_ids = stop_token_ids(model, self.tokenizer, like.recipe.end_of_turn)
        stop_strings = StopStrings.of(self.tokenizer, like.recipe.stop)
        self.engine = NativeEngine(
            model, stop_ids, like.max_new_tokens, seed, num_tokens=num_tokens, stop_strings=stop_strings
        )

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer the checkpoint's prompt of a question. Raises UserError when it is too long."""
        ids = encode(self.like.recipe, self.like.text_of(question, {}), self.tokenizer)
        if self.positions is not None and len(ids) + self.like.max_new_tokens > self.positions:
            raise UserError(
                f"compare: {self.name} has {self.positions} positions, the question needs {len(ids)} and its answer "
                f"{self.like.max_new_tokens}. Lower --max_new_tokens."
            )
        return _ask(self.engine, self.tokenizer, self.like.sampling, tuple(ids), on_text)
