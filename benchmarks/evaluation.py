"""Evaluating a checkpoint: tokens a second beside transformers.generate, and the same rows on one and two ranks.

    python benchmarks/evaluation.py test.jsonl [--limit 0] [--tokens 32] [--timed 128]

`test.jsonl` holds questions and answers with ####, such as GSM8K's 1,319 test questions. The model is a random Qwen3
of a few million parameters, so what is measured is the machinery and not the answers. Every process has one thread.
Control: a checkpoint of another random model, whose rows must differ.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.gsm8k_random import make_model  # noqa: E402
from grpo.checkpoints.manifest import write_manifest  # noqa: E402
from grpo.config.command_line import load_config  # noqa: E402
from grpo.data.recipe import make_recipe, recipe_text  # noqa: E402
from grpo.evaluate.ask import CheckpointModel  # noqa: E402
from grpo.models.checks import quiet  # noqa: E402
from grpo.models.loading import load_tokenizer  # noqa: E402
from grpo.runtime.distributed import World  # noqa: E402
from grpo.types import Counters  # noqa: E402

BATCH = 64


def make_checkpoint(rows: list[dict[str, str]], folder: Path, tokens: int, step: int) -> Path:
    """A random model in a checkpoint folder as training writes it; each step number is another model."""
    make_model(rows, folder, seed=step)
    cfg, _ = load_config(
        [
            "--model",
            str(folder),
            "--data",
            "none.jsonl",
            "--rewards",
            '{"final_answer_reward": 1}',
            "--answer_format",
            "hash",
            "--max_prompt_length",
            "300",
            "--max_generate_length",
            str(tokens),
            "--prompt_template",
            "{question}\n",
        ]
    )
    (folder / "trainer").mkdir()
    state = {"counters": dataclasses.asdict(Counters(step=step)), "config": dataclasses.asdict(cfg)}
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    recipe = make_recipe(cfg, load_tokenizer(str(folder)))
    (folder / "trainer" / "recipe.json").write_text(recipe_text(recipe), encoding="utf-8")
    write_manifest(folder, step)
    return folder


def evaluated(folder: Path, data: Path, limit: int, ranks: int, out: Path) -> tuple[float, float]:
    """Run the command. Returns the seconds of the whole, and the tokens a second that it says."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable,
        *launch,
        "-m",
        "grpo.evaluate",
        "--checkpoint",
        str(folder),
        "--data",
        str(data),
        "--limit",
        str(limit),
        "--num_threads",
        "1",
        "--batch_rows",
        str(BATCH),
        "--out",
        str(out),
    ]
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    [speed] = re.findall(r"(\d+) tokens/s", done.stderr)
    return time.monotonic() - began, float(speed)


def beside_generate(folder: Path, questions: list[str], tokens: int, rounds: int) -> None:
    """Tokens per second of processor time, ours and those of transformers.generate, in turns, on the same batches.

    One thread, so that on a quiet machine this is the time that passes; a busy one does not change it much.
    """
    checkpoint_model = CheckpointModel(folder, torch.device("cpu"), {"temperature": 0.0})
    prompts = sorted((checkpoint_model.encode(question) for question in questions), key=len, reverse=True)
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    model, ours, theirs = checkpoint_model.engine.model, [], []
    in_engine, generate = [], checkpoint_model.engine.generate

    def timed(*args: Any, **how: Any) -> Any:
        began = time.process_time()
        try:
            return generate(*args, **how)
        finally:
            in_engine.append(time.process_time() - began)

    checkpoint_model.engine.generate = timed
    spent = 0.0
    for _ in range(rounds):
        began = time.process_time()
        waves = [answers for wave in checkpoint_model.answer_all(prompts, 1, BATCH, alone) for _, answers in wave]
        seconds = time.process_time() - began
        spent += seconds
        ours.append(sum(answer.num_tokens for [answer] in waves) / seconds)
        began, num_tokens = time.process_time(), 0
        for at in range(0, len(prompts), BATCH):
            batch = prompts[at : at + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            with torch.no_grad():
                made = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0
                )[:, width:]
            ends = (made == checkpoint_model.tokenizer.eos_token_id).int()
            num_tokens += int((ends.cumsum(1) - ends == 0).sum())
        theirs.append(num_tokens / (time.process_time() - began))
    for name, speeds in (("ours", ours), ("transformers.generate", theirs)):
        print(
            f"{name:24}{sorted(speeds)[len(speeds) // 2]:8.0f} tokens per CPU second (median of {rounds}: "
            f"{min(speeds):.0f} to {max(speeds):.0f})"
        )
    print(f"ours, outside the engine: {1 - sum(in_engine) / spent:.2%} of the time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="questions and answers with ####, JSONL")
    parser.add_argument("--limit", type=int, default=0, help="questions for one and two ranks; 0: all")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--timed", type=int, default=128, help="questions beside transformers.generate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, other = (make_checkpoint(rows, folder / f"checkpoint_{step}", args.tokens, step) for step in (1, 2))
        beside_generate(first, [row["question"] for row in rows[: args.timed]], args.tokens, args.rounds)
        found = {}
        for label, checkpoint, ranks in (("1 rank", first, 1), ("2 ranks", first, 2), ("control", other, 2)):
            out = folder / f"{label}.jsonl"
            seconds, speed = evaluated(checkpoint, args.data, args.limit, ranks, out)
            found[label] = out.read_text(encoding="utf-8").splitlines()
            differ = sum(a != b for a, b in zip(found["1 rank"], found[label], strict=True))
            print(
                f"{label:24}{len(found[label])} rows in {seconds:.0f} s, {speed:.0f} tokens/s; {differ} rows differ "
                "from 1 rank"
            )
    return int(found["1 rank"] != found["2 ranks"] or found["1 rank"] == found["control"])


if __name__ == "__main__":
    sys.exit(main())
