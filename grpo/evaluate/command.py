"""`python -m grpo.evaluate`: a checkpoint answers held-out questions, in one process or on the ranks of torchrun.

    python -m grpo.evaluate --checkpoint output/checkpoint_20 --data test.jsonl --limit 100
    torchrun --standalone --nproc_per_node=2 -m grpo.evaluate --checkpoint output/checkpoint_20

Accuracies are printed, results are written with --out, and --compare tests whether two checkpoints differ.
"""

import argparse
import dataclasses
import os
import time
import typing
from pathlib import Path
from typing import Any

from grpo.checkpoints.best import best_folder
from grpo.checkpoints.choose import choose
from grpo.checkpoints.resume import read_state
from grpo.config.checks import check
from grpo.config.held_out import eval_sets
from grpo.config.messages import OneLineParser
from grpo.config.settings import Config
from grpo.data.questions import load_questions
from grpo.data.recipe import Recipe, load_recipe
from grpo.errors import UserError, warn
from grpo.evaluate import arguments, report
from grpo.evaluate.ask import CheckpointModel
from grpo.evaluate.extract import Marks, marker_of, marks_of, task_of
from grpo.evaluate.on_servers import answer_on_servers
from grpo.models.checks import quiet
from grpo.run.console import Console
from grpo.runtime.distributed import World, start, stop
from grpo.runtime.heartbeat import die_with_parent
from grpo.types import Prompt


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = OneLineParser(
        prog="python -m grpo.evaluate",
        allow_abbrev=False,
        description="Accuracy of a checkpoint on questions with gold answers. Data settings default to the run's own.",
    )
    add = parser.add_argument
    add("--checkpoint", "--model_dir", type=Path, help="checkpoint folder (default: the newest valid one)")
    add("--best", action="store_true", help="the checkpoint that best.json in --output_dir names")
    add("--output_dir", type=Path, default=Path("output"), help="where to look for checkpoints")
    add("--base", help="also evaluate this model, asked with the same prompts, and compare")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two checkpoints, or files written with --out")
    add(
        "--data",
        help="file, folder, hub name, or name of a set in the run's eval_data (default: its only or first set)",
    )
    add("--limit", type=arguments.whole("limit", 0), default=0, help="questions, from the first on; 0: all")
    add("--split", help="split of a hub dataset or a saved folder")
    add("--data_config", help="configuration of a hub dataset")
    add("--question_column")
    add("--answer_column")
    add("--answer_format", help="as in the configuration; the gold answer in its column")
    add("--task", choices=["auto", "number", "choice", "text"], default="auto", help="auto: by the gold answers")
    add("--marks", choices=["auto", *typing.get_args(Marks)], default="auto", help="auto: by the prompt")
    refusal = "marks a refusal to choose (default: the marker of the run's rewards, or ?)"
    add("--refusal", type=arguments.REFUSAL, help=refusal)
    samples = arguments.whole("samples", 1, 1024)
    add("--samples", type=samples, default=1, help="completions per question; above 1: pass@k, maj@k")
    add("--temperature", type=arguments.TEMPERATURE, help="default: 0, or the run's with several samples")
    add("--top_p", type=arguments.TOP_P, default=1.0)
    add("--seed", type=arguments.SEED, default=0)
    add("--max_new_tokens", "--max_tokens", type=arguments.MAX_NEW_TOKENS, help="default: as in training")
    add("--batch_rows", type=arguments.BATCH_ROWS, default=64, help="completions decoded together")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["fp32", "bf16"], help="default: as in training")
    threads = arguments.whole("num_threads", 1)
    add("--num_threads", type=threads, help="CPU threads of each process (default: as num_threads null)")
    server = "a rollout server that answers in place of this process (docs/vllm.md); may be repeated"
    add("--server", action="append", metavar="URL", help=server)
    add("--out", type=Path, help="JSONL of results: q, gold, pred, full, correct")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Check which arguments go together. Raises UserError."""
    if args.samples > 1 and args.temperature == 0:
        raise UserError(f"samples: {args.samples} greedy completions are all the same. Use --temperature 1.")
    if (args.checkpoint is not None) + args.best + (args.compare is not None) > 1:
        raise UserError("checkpoint, best, compare: choose one.")
    if args.compare is not None and args.base is not None:
        raise UserError("base, compare: choose one. --compare takes two checkpoints or files of results.")
    if args.compare is not None and args.out is not None:
        raise UserError("out: --compare writes no results. Evaluate A and B apart, each with --out.")
    for path in args.compare or []:
        if not path.exists():
            raise UserError(f"compare: no such checkpoint or file {str(path)[:200]!r}. Give a file written with --out.")


def data_settings(folder: Path, args: argparse.Namespace, recipe: Recipe) -> Config:
    """The run's settings, replaced by those of the recipe and then by the command line's. Raises UserError."""
    saved: dict[str, Any] = read_state(folder)["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    own = {key: value for key, value in saved.items() if key in known} | {
        "system_prompt": recipe.system_prompt,
        "prompt_template": recipe.prompt_template,
        "system_role": recipe.system_role,
        "max_prompt_length": recipe.max_prompt_length,
        "max_generate_length": recipe.max_generate_length,
        "eval_rows": args.limit,
    }
    sets = own.get("eval_data")
    data = sets.get(args.data, args.data) if isinstance(sets, dict) else args.data  # a set's name, or its place
    if data is not None:
        own["eval_split_size"] = 0.0  # the part of the training data that the run held out is not used
    given = {
        "eval_data": data,
        "eval_split": args.split,
        "data_config": args.data_config,
        "dtype": args.dtype,
        "question_column": args.question_column,
        "answer_column": args.answer_column,
        "answer_format": args.answer_format,
    }
    cfg = Config(**own | {key: value for key, value in given.items() if value is not None})
    check(cfg)
    cfg = next(iter(eval_sets(cfg).values()), cfg)  # the first of several sets
    if cfg.eval_data is None and not cfg.eval_split_size:
        raise UserError(f"data: none given, and {folder} was trained without eval_data. Use --data FILE.")
    if cfg.answer_column is None:
        raise UserError("answer_column: none, and without gold answers there is no accuracy. Use --answer_column NAME.")
    return cfg


def question_of(prompt: Prompt) -> str:
    """The question as in the data; for a conversation, the text of the prompt."""
    question = prompt.columns.get("question")
    return question if isinstance(question, str) else prompt.text


def evaluate_checkpoint(
    folder: Path, args: argparse.Namespace, world: World, weights: str | None = None
) -> report.Graded:
    """Evaluate one checkpoint: lines on stdout, results to --out, from rank 0. Returns the results there, else [].

    weights: another model to evaluate in its place, as it is asked; nothing is written.
    """
    cfg = data_settings(folder, args, load_recipe(folder / "trainer" / "recipe.json"))
    greedy = args.samples == 1 if args.temperature is None else args.temperature == 0
    sampling = {"temperature": 0.0 if greedy else args.temperature or cfg.temperature, "top_p": args.top_p}
    model = CheckpointModel(folder, world.device, sampling, args.max_new_tokens, args.seed, cfg.dtype, weights)
    if args.server:
        answer_on_servers(model, args.server, world)
    questions = load_questions(cfg, model.recipe, model.tokenizer, held_out=True)
    golds = [str(prompt.columns["answer"]) for prompt in questions.items]
    rules = report.Rules(
        task_of(golds) if args.task == "auto" else args.task,
        marks_of(questions.items[0].text, rewards=cfg.rewards) if args.marks == "auto" else args.marks,
        args.refusal or marker_of(dataclasses.asdict(cfg)),
        cfg.console_language,
    )
    if world.is_main:
        left_out = "".join(f"; {count} left out: {rule}" for rule, count in questions.drops.items() if count)
        count = f"{len(golds)} questions of {cfg.eval_data or cfg.data}{left_out}"
        other = f", with the weights of {weights}" if weights else ""
        warn(f"checkpoint: {folder}{other}; {count}; task {rules.task}, answers in {rules.marks}")
    results: list[report.Result] = []
    num_tokens, began = 0, time.monotonic()
    console, progress = Console(world.is_main), report.Progress(len(golds), rules.language)
    prompts = [prompt.token_ids for prompt in questions.items]
    with console:
        console.start(len(golds), 0, "questions")
        for answered in model.answer_all(prompts, args.samples, args.batch_rows, world):
            for i, answers in answered:
                graded = report.grade(question_of(questions.items[i]), golds[i], answers, rules)
                num_tokens += sum(answer.num_tokens for answer in answers)
                console.write_line(progress.line(graded[0]))
                console.advance("questions")
                results += graded
    if not world.is_main:
        return []
    seconds = time.monotonic() - began
    warn(f"{num_tokens} tokens in {seconds:.1f} s: {num_tokens / max(seconds, 1e-9):.0f} tokens/s")
    if args.out is not None and weights is None:
        arguments.write_whole(args.out, lambda path: report.write_results(path, results, args.samples > 1))
    print("\n".join(report.final_lines(results, rules)), flush=True)
    return [(result.question, result.gold, result.correct) for result in results if result.index == 0]


def graded_of(path: Path, args: argparse.Namespace, world: World) -> report.Graded:
    """The results of an argument of --compare: read from a file, or made by evaluating a checkpoint."""
    if path.is_file():
        return report.read_results(path)
    return evaluate_checkpoint(choose(path, args.output_dir), args, world)


def run(args: argparse.Namespace, world: World) -> None:
    """Evaluate one checkpoint, or compare two."""
    if args.compare is None:
        folder = choose(best_folder(args.output_dir) if args.best else args.checkpoint, args.output_dir)
        before = evaluate_checkpoint(folder, args, world, args.base) if args.base is not None else None
        after = evaluate_checkpoint(folder, args, world)
        if before is not None and world.is_main:
            print(report.comparison([args.base, str(folder)], before, after), flush=True)
        return
    first, second = (graded_of(path, args, world) for path in args.compare)
    if world.is_main:
        print(report.comparison([str(path) for path in args.compare], first, second), flush=True)


def main(argv: list[str]) -> int:
    """Evaluate, under torchrun or in one process. Returns the exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        die_with_parent()
        args = parse(argv)
        quiet()
        world = start(args.device, args.num_threads)
        try:
            run(args, world)
        finally:
            stop()
    except KeyboardInterrupt:
        warn("stopped: nothing was written")
        return 130
    except UserError as error:
        if is_main or error.on_one_rank:
            warn(f"error: {error}")
        return error.code
    return 0
