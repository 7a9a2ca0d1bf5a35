"""A tiny model trained on a few prompts until it answers them, in a checkpoint folder as training writes it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo.checkpoints.contents import step_of
from grpo.checkpoints.manifest import write_manifest
from grpo.config.command_line import load_config
from grpo.data.recipe import build, encode, make_recipe, recipe_text, render
from grpo.types import Counters
from tests.support.tiny import tiny_model, tiny_tokenizer

MAX_STEPS = 600


def taught_checkpoint(
    folder: Path, lessons: Sequence[tuple[str, dict[str, str], str]], settings: Sequence[str]
) -> Path:
    """Write folder checkpoint_N: greedily, the model gives the answer of each lesson (question, columns, answer).

    settings: words of a command line, as train.py takes them.
    """
    cfg, _ = load_config(
        ["--model", "m", "--data", "d.jsonl", "--chat_template", "false", "--rewards", '{"mark_reward": 1}', *settings]
    )
    tokenizer = tiny_tokenizer()
    recipe = make_recipe(cfg, tokenizer)
    rows = []
    for question, columns, answer in lessons:
        prompt = encode(recipe, render(recipe, build(recipe, question, columns), tokenizer), tokenizer)
        rows.append((prompt, [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))
    model = tiny_model("qwen3", len(tokenizer), spread=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for so small a model
    teach(model, rows)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "trainer").mkdir()
    state = {"counters": dataclasses.asdict(Counters(step=1)), "config": dataclasses.asdict(cfg)}
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    (folder / "trainer" / "recipe.json").write_text(recipe_text(recipe), encoding="utf-8")
    write_manifest(folder, step_of(folder))
    return folder


def teach(model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """Fit the completions until each token is the likeliest by a margin."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    wanted = torch.full((len(rows), width), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        wanted[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(MAX_STEPS):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, wanted[:, 1:].flatten(), reduction="none", ignore_index=-100)
        if losses.max() < 0.2:
            return
        optimizer.zero_grad()
        losses.sum().div((wanted >= 0).sum()).backward()
        optimizer.step()
    raise AssertionError(f"not learned in {MAX_STEPS} steps: loss {losses.max():.3f}")
