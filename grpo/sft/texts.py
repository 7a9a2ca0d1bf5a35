"""Questions with reference solutions -> texts to train on: the same prompt as in GRPO, and the solution after it.

The solution is rendered by the chat template as the assistant's turn and ends with the token that ends a completion,
so that the model learns to stop. `SftTexts.of_step` is a pure function of (seed, step), like `Questions.prompts`.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.names import model_name
from grpo.config.settings import Config
from grpo.config.sft_section import SftSettings, own_settings
from grpo.data.chat_templates import end_renderers
from grpo.data.nested import cell_of
from grpo.data.questions import Questions
from grpo.data.recipe import Recipe, encode_all, fill, is_continued, rendered
from grpo.errors import UserError
from grpo.models.checks import stop_token_ids, without_weights
from grpo.types import Prompt, TrainRow

TOO_LONG = "solutions longer than max_generate_length"


@dataclass(frozen=True)
class SftTexts:
    """Prompts with their solutions, and their order."""

    questions: Questions
    solutions: list[np.ndarray]  # [C] int32 each, by Prompt.row, the end token included
    whole: bool = False  # train on the prompt's tokens too

    def of_step(self, step: int, num_texts: int) -> list[TrainRow]:
        """The texts of a step."""
        return [self._row(n, prompt) for n, prompt in enumerate(self.questions.prompts(step, num_texts))]

    def all(self) -> list[TrainRow]:
        """Every text once."""
        return [self._row(n, prompt) for n, prompt in enumerate(self.questions.items)]

    def _row(self, row: int, prompt: Prompt) -> TrainRow:
        prompt_ids, target_ids = prompt.token_ids, self.solutions[prompt.data_row]
        if self.whole:  # all but the first token, which no token predicts
            target_ids = np.concatenate([np.array(prompt_ids[1:], np.int32), target_ids])
            prompt_ids = prompt_ids[:1]
        return TrainRow(row, prompt_ids, target_ids, np.zeros(len(target_ids), np.float32), None, 0.0)


def load_texts(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, questions: Questions, stop_ids: frozenset[int]
) -> SftTexts:
    """Add the solution to every question; drop and count those that are too long. Raises UserError."""
    own = own_settings(cfg)
    if not stop_ids:
        raise UserError("model: it names no eos_token_id, so its answers could not end. Give one in config.json.")
    completions = [_completion(item, solution_of(item, own, cfg), recipe, tokenizer) for item in questions.items]
    end_renderers()
    eos = tokenizer.eos_token_id
    end_id = eos if eos in stop_ids else min(stop_ids)
    # tokenize prompt and completion together, because tokens may differ at the border
    texts = [item.text + completion for item, completion in zip(questions.items, completions, strict=True)]
    ids_of_texts = encode_all(recipe, texts, tokenizer)
    items: list[Prompt] = []
    solutions: list[np.ndarray] = []
    for item, completion, text_ids in zip(questions.items, completions, ids_of_texts, strict=True):
        prompt_ids = list(item.token_ids)
        if text_ids[: len(prompt_ids)] == prompt_ids:
            ids = text_ids[len(prompt_ids) :]
        else:  # a token spans the border: tokenize the completion alone, so that the prompt stays the same
            ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = _end_with_stop_token(ids, stop_ids, end_id)
        if len(ids) <= cfg.max_generate_length:
            items.append(dataclasses.replace(item, data_row=len(items)))
            solutions.append(np.array(ids, np.int32))
    dropped = len(questions.items) - len(items)
    if not items:
        raise UserError(
            f"data: every solution ({dropped}) is longer than max_generate_length {cfg.max_generate_length}. Raise it."
        )
    drops = {**questions.drops, **({TOO_LONG: dropped} if dropped else {})}
    usable = dataclasses.replace(questions, items=items, num_dropped=questions.num_dropped + dropped, drops=drops)
    return SftTexts(usable, solutions, own.loss_on == "all")


def texts_to_show(
    cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> tuple[Questions, list[list[int]]]:
    """The questions that are used, and the tokens to be learned after each prompt. Raises UserError.

    With `loss_on: all` the prompt's tokens are learned too.
    """
    texts = load_texts(
        cfg,
        recipe,
        tokenizer,
        questions,
        stop_token_ids(without_weights(model_name(cfg)), tokenizer, recipe.end_of_turn),
    )
    return texts.questions, [ids.tolist() for ids in texts.solutions]


def solutions_sha256(questions: Questions) -> str:
    """Fingerprint of the solutions: the unchanged cells of the answer column, of which `answer` may be a part."""
    digest = hashlib.sha256()
    for item in questions.items:
        digest.update(json.dumps(item.reference, default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def solution_of(item: Prompt, own: SftSettings, cfg: Config) -> str:
    """The text of solution_column and solution_template for a row. Raises UserError naming the row."""
    cells: dict[str, Any] = dict(item.columns)
    column = own.solution_column
    if column is not None:
        own_cell = item.columns["answer"] if isinstance(item.reference, dict) else item.reference  # an object's text
        try:
            cells["solution"] = own_cell if column == cfg.answer_column else cell_of(cells, column)
        except LookupError as error:
            raise UserError(f"solution_column: the data {error.args[0]}.") from None
    template = "{solution}" if own.solution_template is None else own.solution_template
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in cells:
            raise UserError(
                f"solution_template: the data has no column {name!r}, only {sorted(cells)}. Mend it; held-out "
                "questions need the same columns (eval_data: null leaves them out)."
            )
        cells[name] = _cleaned(cells[name], own.solution_remove, cfg.strip_cells)
        if not str(cells[name]).strip():
            raise UserError(
                f"data: question {item.data_row + 1}, column {name!r}: the cell is empty. Mend or drop the row."
            )
    return fill(template, cells)


def _cleaned(cell: Any, remove: list[str], strip: bool) -> Any:
    if cell is None:
        return ""
    text = str(cell)
    for unwanted in remove:
        text = text.replace(unwanted, "")
    return text.strip() if strip else text


def _completion(item: Prompt, solution: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text after the prompt: the solution and, with a chat template, what ends the assistant's turn."""
    try:
        solution.encode()
    except UnicodeEncodeError:
        raise UserError(f"data: question {item.data_row + 1}: its solution has half of a surrogate pair.") from None
    if not recipe.chat:
        return solution
    assert item.messages is not None
    turns = [*item.messages, {"role": "assistant", "content": solution}]
    if is_continued(recipe, item.messages):
        begun = item.messages[-1]
        turns = [*item.messages[:-1], {**begun, "content": begun["content"] + solution}]
    text = rendered(recipe, turns, tokenizer, "closed")
    if not text.startswith(item.text):
        raise UserError(
            f"chat_template: question {item.data_row + 1}: rendered with the solution, the conversation does not begin "
            "with the prompt, so it cannot be used. Try --chat_template false, or chat_template_file."
        )
    return text[len(item.text) :]


def _end_with_stop_token(ids: list[int], stop_ids: frozenset[int], end_id: int) -> list[int]:
    """Cut after the first stop token; append `end_id` if there is no stop token.

    >>> _end_with_stop_token([5, 0, 8], frozenset({0}), 0), _end_with_stop_token([5], frozenset({0, 2}), 2)
    ([5, 0], [5, 2])
    """
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return [*ids, end_id]
