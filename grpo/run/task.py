"""What a run trains on: the tokenizer, the prompt recipe, the questions and the held-out questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.held_out import eval_sets
from grpo.config.names import model_name
from grpo.config.settings import Config
from grpo.data.questions import Questions, load_questions
from grpo.data.recipe import Recipe, keep_questions, make_recipe
from grpo.errors import UserError
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
    held_out = {name: _load_held_out(name, one, recipe, tokenizer) for name, one in eval_sets(cfg).items()}
    recipe = keep_questions(recipe, next(iter(held_out.values()), questions).first_questions(4))
    return Task(tokenizer, recipe, questions, held_out)


def _load_held_out(name: str, cfg: Config, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """The questions of one held-out set. Raises UserError, which names eval_data where they are not a part of data."""
    try:
        return load_questions(cfg, recipe, tokenizer, held_out=True)
    except UserError as error:
        if cfg.eval_data is None or not str(error).startswith("data: "):
            raise
        text = str(error).removeprefix("data: ").replace("--data_split", "--eval_split")
        raise UserError(f"eval_data: {f'{name}: ' if name else ''}{text}") from None


def held_out_notices(cfg: Config, questions: Questions, held_out: Mapping[str, Questions]) -> list[str]:
    """Lines about held-out questions that are trained on too, and about settings that need held-out questions."""
    trained = {one.text for one in questions.items}
    lines = []
    for name, one in eval_sets(cfg).items():
        shared = sum(item.text in trained for item in held_out[name].items)
        if shared:
            lines.append(
                f"warning: eval_data: {shared} of the {len(held_out[name].items)} questions of {one.eval_data} are in "
                "the training data too, so their accuracy is not that of new questions."
            )
    unused = [setting for setting in ("eval_steps", "eval_generations") if getattr(cfg, setting)]
    if unused and not held_out:
        lines.append(
            f"warning: {', '.join(unused)}: nothing is evaluated, there are no held-out questions. Set eval_data or "
            "eval_split_size."
        )
    return lines
