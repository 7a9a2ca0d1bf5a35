"""The recipe that turns a question into a prompt, for training, evaluation and inference alike.

Every checkpoint holds its recipe (`trainer/recipe.json`), and inference.py uses that one.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.checks import kwargs_problem
from grpo.config.names import find_path
from grpo.config.settings import Config
from grpo.data.chat_templates import Ending, TemplateRefused, render_chat
from grpo.data.turns import check_reads_text, end_of_turn, fold_system
from grpo.errors import UserError
from grpo.strict_json import check_regular, read_object

MAX_TEMPLATE_BYTES = 2**20
KEPT = ("date", "rules", "end_of_turn")  # what a resumed run takes from its checkpoint's recipe


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
    system_role: str = "system"  # user: the system message is put before the first user turn
    date: str | None = None  # that the chat template prints, of the run's start; None: today's
    end_of_turn: str | None = None  # the token that ends an assistant turn in the chat template: it ends a completion
    stop: list[str] = field(default_factory=list)  # texts that end a completion
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables for the chat template
    # 1: the tokenizer adds its special tokens to plain text in any case, and a last assistant turn is closed. In
    # recipes of older checkpoints, which have no such field.
    rules: int = 2


def make_recipe(cfg: Config, tokenizer: PreTrainedTokenizerBase, kept: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a run. Raises UserError when a chat template is required and missing.

    kept: fields that are given, such as those of the checkpoint that is resumed (KEPT); the others follow from the
    settings and the tokenizer.

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
    chat = has_template and cfg.chat_template is not False
    given = {"chat_template_kwargs": cfg.chat_template_kwargs, **(kept or {})}
    _check_kwargs(cfg, tokenizer, chat)
    if chat and "end_of_turn" not in given:
        template, variables = _template_of(tokenizer), _variables(given["chat_template_kwargs"], tokenizer)
        check_reads_text(template, variables, given.get("date"))
        given["end_of_turn"] = end_of_turn(template, variables, tokenizer, given.get("date"))
    if given.get("end_of_turn") in tokenizer.get_added_vocab():  # special: no part of the text that rewards get
        tokenizer.add_tokens([given["end_of_turn"]], special_tokens=True)
    return Recipe(
        system_prompt=cfg.system_prompt,
        prompt_template=cfg.prompt_template,
        chat=chat,
        strip_cells=cfg.strip_cells,
        example_question=cfg.example_question,
        example_answer=cfg.example_answer,
        max_prompt_length=cfg.max_prompt_length,
        max_generate_length=cfg.max_generate_length,
        logit_clamp=cfg.logit_clamp,
        questions=cfg.inference_questions,
        system_role=cfg.system_role,
        stop=cfg.stop,
        **given,
    )


def _check_kwargs(cfg: Config, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """Refuse variables that the chat template does not read, or gets from the tokenizer. Raises UserError."""
    if cfg.chat_template_kwargs and not chat:
        raise UserError(
            f"chat_template_kwargs: the tokenizer of {cfg.model!r} has no chat template that could read "
            f"{', '.join(cfg.chat_template_kwargs)[:200]}. Leave them out, or give one: --chat_template_file FILE."
        )
    for name in cfg.chat_template_kwargs:
        if name in tokenizer.special_tokens_map:
            raise UserError(f"chat_template_kwargs: {name} is given to the template by the tokenizer. Leave it out.")
        if not re.search(rf"\b{re.escape(name)}\b", _template_of(tokenizer)):
            raise UserError(
                f"chat_template_kwargs: the chat template of {cfg.model!r} does not read {name[:60]!r}, so it would "
                "have no effect. Mend the name, or leave it out."
            )


def _variables(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {**kwargs, **tokenizer.special_tokens_map}


def rendered(recipe: Recipe, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, ending: Ending) -> str:
    """The text of a conversation by the chat template. Raises UserError, see `render_chat`."""
    variables = _variables(recipe.chat_template_kwargs, tokenizer)
    return render_chat(_template_of(tokenizer), variables, turns, ending, recipe.date)


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
    return fold_system(turns) if recipe.system_role == "user" else turns


def is_continued(recipe: Recipe, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the completion continues the conversation's last turn, which is the assistant's."""
    return messages[-1]["role"] == "assistant" and recipe.rules > 1


def render(recipe: Recipe, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt's text. Without a chat template: the contents of all turns, each on lines of its own.

    Raises UserError when the chat template refuses the conversation or exceeds its limits (chat_templates.py).
    """
    if not recipe.chat:
        *before, last = [message.get("content") or "" for message in messages]
        return "".join(text if text.endswith("\n") else text + "\n" for text in before) + last
    ending: Ending = "continued" if is_continued(recipe, messages) else "open"
    try:
        return rendered(recipe, messages, tokenizer, ending)
    except TemplateRefused as refused:
        reason, advice = refused.reason, None
        if "continue_final_message" in reason:
            reason = "the conversation ends with an assistant turn, and the template does not keep that turn's text"
            advice = "End the question with a user turn, or try --chat_template false."
        elif "Error" in reason and any(turn["role"] == "system" for turn in messages):
            with contextlib.suppress(UserError):
                rendered(recipe, fold_system(messages), tokenizer, ending)
                advice = (
                    "Without the system message it does not: say --system_role user, which puts that message before "
                    "the first user turn, or move system_prompt into prompt_template."
                )
        raise TemplateRefused(reason, *filter(None, [advice])) from None


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template to use. Raises UserError."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(
            f"chat_template: the tokenizer has none to use: {str(error)[:200]} Try --chat_template false."
        ) from None


def encode(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids, see `encode_all`.

    Raises UserError for half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: character {error.start + 1} is half of a surrogate pair and has no UTF-8. Mend the text."
        ) from None
    return encode_all(recipe, [text], tokenizer)[0]


def encode_all(recipe: Recipe, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that begin with a prompt. A chat template writes its special tokens itself.

    Plain text gets the tokens that the tokenizer puts at the start (BOS), as far as it does not begin with them, and
    none of those that it puts at the end (EOS): the completion follows there.
    """
    if recipe.chat or recipe.rules < 2:
        return tokenizer(list(texts), add_special_tokens=not recipe.chat)["input_ids"]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = list(takewhile(lambda token: token not in letter, tokenizer("a")["input_ids"]))
    return [_after(start, ids) + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _after(start: list[int], ids: list[int]) -> list[int]:
    """The part of `start` to put before `ids`, whose own beginning may be the end of `start`.

    >>> _after([1, 2], [7]), _after([1, 2], [2, 7]), _after([1, 2], [1, 2, 7])
    ([1, 2], [1], [])
    """
    overlap = next((n for n in range(len(start), 0, -1) if ids[:n] == start[-n:]), 0)
    return start[: len(start) - overlap]


def keep_questions(recipe: Recipe, questions: list[str]) -> Recipe:
    """The recipe with these questions for inference.py, unless it has some already."""
    return recipe if recipe.questions else dataclasses.replace(recipe, questions=questions)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as JSON."""
    return json.dumps(dataclasses.asdict(recipe), ensure_ascii=False, indent=2) + "\n"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError for a file that does not hold one."""
    try:
        recipe = Recipe(**{"rules": 1, **read_object(path)})
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
        "system_role": recipe.system_role in ("system", "user"),
        "date": recipe.date is None or (isinstance(recipe.date, str) and _is_date(recipe.date)),
        "end_of_turn": recipe.end_of_turn is None or isinstance(recipe.end_of_turn, str),
        "stop": isinstance(recipe.stop, list) and all(isinstance(text, str) and text for text in recipe.stop),
        "chat_template_kwargs": isinstance(recipe.chat_template_kwargs, dict)
        and kwargs_problem(recipe.chat_template_kwargs) is None,
        "rules": type(recipe.rules) is int and recipe.rules in (1, 2),
    }
    for name, is_valid in checks.items():
        if not is_valid:
            raise ValueError(f"{name} has a wrong type or value")


def _is_date(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
