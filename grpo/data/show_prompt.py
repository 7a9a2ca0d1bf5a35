"""`train.py --show_prompt N`: the prompt of question N, counted from 0, and its number of tokens.

The prompt's text and one line break go to stdout; its number of tokens and gold answer go to stderr. In supervised
training (`python -m grpo.sft`) the text to be learned follows the prompt. Nothing is trained, no folder is written, and
a chat template that prints the date prints today's.
"""

import os
import sys
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from grpo.config.command_line import load_config, take_show_prompt
from grpo.config.names import model_name
from grpo.config.settings import Config
from grpo.data.questions import Questions, length_summary, load_questions
from grpo.data.recipe import Recipe, make_recipe
from grpo.errors import UserError, warn
from grpo.models.checks import quiet
from grpo.models.loading import load_tokenizer

# from the questions: those that are used, and the tokens to be learned after each
Solve = Callable[[Config, Recipe, PreTrainedTokenizerBase, Questions], tuple[Questions, Sequence[Sequence[int]]]]


def show_prompt(
    argv: list[str],
    load: Callable[[list[str]], tuple[Config, str | None]] = load_config,
    solve: Solve | None = None,
) -> int:
    """Print the prompt of `--show_prompt N`, on rank 0 only. Returns the exit code.

    solve: in supervised training, what finds the text to be learned.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        _, row = take_show_prompt(argv)
        cfg, _ = load(argv)
        assert row is not None
        quiet()
        tokenizer = load_tokenizer(model_name(cfg))
        recipe = make_recipe(cfg, tokenizer)
        questions, learned = load_questions(cfg, recipe, tokenizer), None
        if solve is not None:
            questions, learned = solve(cfg, recipe, tokenizer, questions)
        if row >= len(questions.items):
            raise UserError(f"show_prompt: must be 0 to {len(questions.items) - 1}, got {row}.")
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    prompt = questions.items[row]
    warn(f"data {cfg.data}: {length_summary(questions)}")
    gold = f"; gold answer {prompt.columns['answer']!r}" if cfg.answer_column is not None else ""
    warn(f"prompt {row}: {len(prompt.token_ids)} tokens{gold}")
    text = prompt.text
    if learned is not None:
        solution = str(tokenizer.decode(list(learned[row]), clean_up_tokenization_spaces=False))
        warn(f"text to be learned after it: {len(learned[row])} tokens, {solution!r}")
        text += solution
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0
