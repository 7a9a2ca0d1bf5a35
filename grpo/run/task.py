"""What a run trains on: the tokenizer, the prompt recipe, the questions and the held-out questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config, model_name
from grpo.data.questions import Questions, load_questions
from grpo.data.recipe import Recipe, keep_questions, make_recipe
from grpo.models.loading import load_tokenizer


@dataclass(frozen=True)
class Task:
    """The same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe  # with the questions that inference.py offers as built-in cases
    questions: Questions
    held_out: Questions | None  # None: nothing is evaluated


def load_task(cfg: Config, kept: Mapping[str, Any] | None = None) -> Task:
    """Load tokenizer and questions and render the prompts. kept: see `make_recipe`. Raises UserError."""
    tokenizer = load_tokenizer(model_name(cfg))
    recipe = make_recipe(cfg, tokenizer, kept)
    questions = load_questions(cfg, recipe, tokenizer)
    held_out = load_questions(cfg, recipe, tokenizer, held_out=True) if cfg.eval_data or cfg.eval_split_size else None
    recipe = keep_questions(recipe, (held_out or questions).first_questions(4))
    return Task(tokenizer, recipe, questions, held_out)
