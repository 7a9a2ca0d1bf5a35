"""What a run trains on: the tokenizer, the prompt recipe, the questions and the held-out questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.held_out import eval_sets
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
    held_out: dict[str, Questions]  # sets by name, see eval_sets; empty: nothing is evaluated


def load_task(cfg: Config, kept: Mapping[str, Any] | None = None) -> Task:
    """Load tokenizer and questions and render the prompts. kept: see `make_recipe`. Raises UserError."""
    tokenizer = load_tokenizer(model_name(cfg))
    recipe = make_recipe(cfg, tokenizer, kept)
    questions = load_questions(cfg, recipe, tokenizer)
    held_out = {name: load_questions(one, recipe, tokenizer, held_out=True) for name, one in eval_sets(cfg).items()}
    recipe = keep_questions(recipe, next(iter(held_out.values()), questions).first_questions(4))
    return Task(tokenizer, recipe, questions, held_out)
