"""The recipe that turns a question into a prompt, for training, evaluation and inference alike.

Every checkpoint holds its recipe (`trainer/recipe.json`), and inference.py uses that one.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config, find_path
from grpo.data.chat_templates import render_chat
from grpo.errors import UserError
from grpo.strict_json import check_regular, read_object

MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True)
class Recipe:
    """The parts of a prompt, and the limits of prompt, completion and logits."""

    system_prompt: str | None = None
    prompt_template: str = "{question}"
    chat: bool = False  # render through the tokenizer's chat template
    strip_cells: bool = False  # strip white space around cells before they are put into the template
    example_question: str | None = None  # one turn of each side before the question
    example_answer: str | None = None
    max_prompt_length: int = 256
    max_generate_length: int = 256
    logit_clamp: float = 100.0
    questions: list[str] = field(default_factory=list)  # built-in cases of inference.py


def make_recipe(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe of a run. Raises UserError when a chat template is required and missing.

    The template of chat_template_file is put into the tokenizer, which every checkpoint is saved with: inference,
    evaluation and other programs find it there.
    """
    if cfg.chat_template_file is not None:
        tokenizer.chat_template = read_template(cfg.chat_template_file)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if cfg.chat_template and not has_template:
        raise UserError(
            f"chat_template: true, but the tokenizer of {cfg.model!r} has none. Use null or false, and prompt_template."
        )
    return Recipe(
        system_prompt=cfg.system_prompt,
        prompt_template=cfg.prompt_template,
        chat=has_template and cfg.chat_template is not False,
        strip_cells=cfg.strip_cells,
        example_question=cfg.example_question,
        example_answer=cfg.example_answer,
        max_prompt_length=cfg.max_prompt_length,
        max_generate_length=cfg.max_generate_length,
        logit_clamp=cfg.logit_clamp,
        questions=cfg.inference_questions,
    )


def read_template(name: str) -> str:
    """Read a chat template from a file. Raises UserError. The first prompt shows whether it renders."""
    path = find_path(name)
    if path is None or not path.is_file():
        raise UserError(
            f"chat_template_file: no such file {name!r}. Give a Jinja file, such as configs/working_out.jinja."
        )
    try:
        check_regular(path, MAX_TEMPLATE_BYTES)
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        return text
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template_file: {name!r} is not used: {error}. Give a Jinja file in UTF-8.") from None


def fill(template: str, columns: dict[str, Any]) -> str:
    """Put columns into {name}s; other braces stay as they are.

    >>> fill("{question} Answer as {x}:", {"question": "2+2?"})
    '2+2? Answer as {x}:'
    """
    return re.sub(r"\{(\w+)\}", lambda m: str(columns[m[1]]) if m[1] in columns else m[0], template)


def build(recipe: Recipe, question: str | list[dict[str, str]], columns: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation behind a prompt: the system message, the example, then the user's turn (or given messages)."""
    if isinstance(question, str):
        cells = {**columns, "question": question}
        if recipe.strip_cells:
            cells = {name: cell.strip() if isinstance(cell, str) else cell for name, cell in cells.items()}
        turns = [{"role": "user", "content": fill(recipe.prompt_template, cells)}]
    else:
        turns = list(question)
    if recipe.system_prompt and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": recipe.system_prompt})
    if recipe.example_question is not None and recipe.example_answer is not None:
        start = 1 if turns[0]["role"] == "system" else 0
        turns[start:start] = [
            {"role": "user", "content": recipe.example_question},
            {"role": "assistant", "content": recipe.example_answer},
        ]
    return turns


def render(recipe: Recipe, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt's text. Without a chat template: the contents of all turns, each on lines of its own.

    Raises UserError when the chat template refuses the conversation or exceeds its limits (chat_templates.py).
    """
    if not recipe.chat:
        *before, last = [message["content"] for message in messages]
        return "".join(text if text.endswith("\n") else text + "\n" for text in before) + last
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"chat_template: the tokenizer has none to use: {str(error)[:200]} Try --chat_template false."
        ) from None
    return render_chat(template, tokenizer.special_tokens_map, messages)


def encode(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids. A chat template writes its special tokens itself; plain text gets the tokenizer's.

    Raises UserError for half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: character {error.start + 1} is half of a surrogate pair and has no UTF-8. Mend the text."
        ) from None
    return tokenizer(text, add_special_tokens=not recipe.chat)["input_ids"]


def keep_questions(recipe: Recipe, questions: list[str]) -> Recipe:
    """The recipe with these questions for inference.py, unless it has some already."""
    return recipe if recipe.questions else dataclasses.replace(recipe, questions=questions)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as JSON."""
    return json.dumps(dataclasses.asdict(recipe), ensure_ascii=False, indent=2) + "\n"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError for a file that does not hold one."""
    try:
        recipe = Recipe(**read_object(path))
        _check_recipe(recipe)
        return recipe
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint: {path} is not a prompt recipe ({error}). Choose a checkpoint written by train.py."
        ) from None


def _check_recipe(recipe: Recipe) -> None:
    """Check types and ranges. Raises ValueError naming the field."""
    lengths = (recipe.max_prompt_length, recipe.max_generate_length)
    checks = {
        "system_prompt": recipe.system_prompt is None or isinstance(recipe.system_prompt, str),
        "prompt_template": isinstance(recipe.prompt_template, str),
        "chat, strip_cells": isinstance(recipe.chat, bool) and isinstance(recipe.strip_cells, bool),
        "example_question, example_answer": all(
            text is None or isinstance(text, str) for text in (recipe.example_question, recipe.example_answer)
        ),
        "max_prompt_length, max_generate_length": all(type(n) is int and 1 <= n < 2**31 for n in lengths),
        "logit_clamp": type(recipe.logit_clamp) in (int, float) and 0 < recipe.logit_clamp < math.inf,
        "questions": isinstance(recipe.questions, list) and all(isinstance(text, str) for text in recipe.questions),
    }
    for name, is_valid in checks.items():
        if not is_valid:
            raise ValueError(f"{name} has a wrong type or value")
