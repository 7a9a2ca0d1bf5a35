"""`train.py --show_prompt N`: the prompt of question N, counted from 0, and its number of tokens.

The prompt's text and one line break go to stdout; its number of tokens and gold answer go to stderr. Nothing is
trained and no folder is written.
"""

import os
import sys

from grpo.config.command_line import load_config, take_show_prompt
from grpo.data.questions import length_summary, load_questions
from grpo.data.recipe import make_recipe
from grpo.errors import UserError, warn
from grpo.models.checks import quiet
from grpo.models.loading import load_tokenizer


def show_prompt(argv: list[str]) -> int:
    """Print the prompt of `--show_prompt N`, on rank 0 only. Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        _, row = take_show_prompt(argv)
        cfg, _ = load_config(argv)
        assert cfg.model is not None and row is not None
        quiet()
        tokenizer = load_tokenizer(cfg.model)
        questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)
        if row >= len(questions.items):
            raise UserError(f"show_prompt: must be 0 to {len(questions.items) - 1}, got {row}.")
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    prompt = questions.items[row]
    warn(f"data {cfg.data}: {length_summary(questions)}")
    gold = f"; gold answer {prompt.columns['answer']!r}" if cfg.answer_column is not None else ""
    warn(f"prompt {row}: {len(prompt.token_ids)} tokens{gold}")
    sys.stdout.write(prompt.text + "\n")
    sys.stdout.flush()
    return 0
