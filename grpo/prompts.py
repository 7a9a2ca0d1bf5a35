"""How a question becomes the text that the model reads. One recipe for training, evaluation and inference.

The recipe is saved in every checkpoint (`trainer/recipe.json`), and inference.py uses exactly that.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.config import Config
from grpo.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """The prompt's ingredients, and the sampling that goes with them."""

    system_prompt: str | None = None
    prompt_template: str = "{question}"
    chat: bool = False  # render through the tokenizer's chat template
    max_prompt_length: int = 256
    max_generate_length: int = 256
    logit_clamp: float = 100.0
    questions: list[str] = field(default_factory=list)  # built-in cases of inference.py


def make_recipe(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Settle the recipe of a run. Raises UserError when a chat template is asked for and missing."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if cfg.chat_template and not has_template:
        raise UserError(
            f"chat_template: true, but the tokenizer of {cfg.model!r} has none. Use null or false, and prompt_template."
        )
    return Recipe(
        system_prompt=cfg.system_prompt,
        prompt_template=cfg.prompt_template,
        chat=has_template and cfg.chat_template is not False,
        max_prompt_length=cfg.max_prompt_length,
        max_generate_length=cfg.max_generate_length,
        logit_clamp=cfg.logit_clamp,
        questions=cfg.inference_questions,
    )


def fill(template: str, columns: dict[str, Any]) -> str:
    """Put columns into {name}s; other braces stay as they are.

    >>> fill("{question} Answer as {x}:", {"question": "2+2?"})
    '2+2? Answer as {x}:'
    """
    return re.sub(r"\{(\w+)\}", lambda m: str(columns[m[1]]) if m[1] in columns else m[0], template)


def build(recipe: Recipe, question: str | list[dict[str, str]], columns: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation behind a prompt: the system message, then the user's turn (or the given messages)."""
    if isinstance(question, str):
        turns = [{"role": "user", "content": fill(recipe.prompt_template, {**columns, "question": question})}]
    else:
        turns = list(question)
    if recipe.system_prompt and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": recipe.system_prompt})
    return turns


def render(recipe: Recipe, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The exact text. Without a chat template: the contents, the system prompt on lines of its own.

    Raises UserError when the chat template refuses the conversation.
    """
    if not recipe.chat:
        *before, last = [message["content"] for message in messages]
        return "".join(text if text.endswith("\n") else text + "\n" for text in before) + last
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(
            f"chat_template: the tokenizer's template refused the prompt: {error}. Try --chat_template false."
        ) from None


def encode(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids. A chat template has written its special tokens itself; plain text gets the tokenizer's own."""
    return tokenizer(text, add_special_tokens=not recipe.chat)["input_ids"]


def keep_questions(recipe: Recipe, questions: list[str]) -> Recipe:
    """The recipe with built-in cases for inference.py, unless the config named some."""
    return recipe if recipe.questions else dataclasses.replace(recipe, questions=questions)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(recipe), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError when it is not one."""
    try:
        return Recipe(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint: {path} is not a prompt recipe ({error}). Choose a checkpoint written by train.py."
        ) from None
