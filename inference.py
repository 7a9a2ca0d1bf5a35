"""Ask a trained checkpoint.

    python inference.py "小明有10个苹果，吃了3个，还剩几个？"      the newest valid checkpoint of ./output
    python inference.py --checkpoint output/checkpoint_20 "..."   another one
    python inference.py                                          the checkpoint's own built-in cases
    python inference.py --compare demo/base "..."                beside the model it was trained from
    python inference.py --csv test.csv --out submission.csv      multiple choice: ID,Answer for every row

Prompts are built exactly as in training: the recipe comes from the checkpoint. Answers go to stdout, status to stderr.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.checkpoints.best import best_folder
from grpo.checkpoints.choose import choose
from grpo.checkpoints.resume import read_state
from grpo.config.messages import OneLineParser
from grpo.data.recipe import build, encode, load_recipe, render
from grpo.errors import UserError, exit_with, warn
from grpo.evaluate.arguments import BATCH_ROWS, MAX_NEW_TOKENS, REFUSAL, SEED, TEMPERATURE, TOP_P
from grpo.evaluate.ask import Answer, CheckpointModel, OtherModel
from grpo.evaluate.extract import marks_of, split_reasoning
from grpo.evaluate.multiple_choice import predict
from grpo.models.checks import quiet
from grpo.models.loading import load_tokenizer
from grpo.run.console import json_line
from grpo.run.languages import label, language_of
from grpo.runtime.devices import pick_device
from grpo.runtime.distributed import World


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = OneLineParser(
        "inference.py", description="Ask a trained checkpoint. Without a question: its built-in cases."
    )
    parser.add_argument("words", nargs="*", metavar="question", help="the question; several words are joined")
    parser.add_argument("--question", nargs="+", metavar="WORD", help="the question, as a flag; words are joined, too")
    parser.add_argument("--checkpoint", "--model_dir", type=Path, help="checkpoint folder (default: newest valid one)")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where to look for checkpoints")
    parser.add_argument("--best", action="store_true", help="the checkpoint that best.json in --output_dir names")
    parser.add_argument("--compare", metavar="BASE", help="also ask this model (folder or hub name) the same prompt")
    parser.add_argument("--csv", type=Path, help="multiple-choice questions: ID, Question, Option A to D")
    parser.add_argument("--out", type=Path, help="with --csv: where ID,Answer goes")
    refusal = "with --csv: marks a refusal (default: the marker of the run's rewards, or ?)"
    parser.add_argument("--refusal", type=REFUSAL, help=refusal)
    parser.add_argument("--batch_rows", type=BATCH_ROWS, default=64, help="with --csv: questions answered together")
    parser.add_argument("--max_new_tokens", "--max_tokens", type=MAX_NEW_TOKENS, help="default: as in training")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 (default): greedy, repeatable")
    parser.add_argument("--top_p", type=TOP_P, default=1.0)
    parser.add_argument("--seed", type=SEED, default=0, help="of the sampling, when temperature > 0")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line, the answer apart from its reasoning"
    )
    server = "a rollout server that answers in place of this process (docs/vllm.md); may be repeated"
    parser.add_argument("--server", action="append", metavar="URL", help=server)
    parser.add_argument("--show_prompt", action="store_true", help="print the question's prompt and answer nothing")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is sampled")
    args = parser.parse_intermixed_args(argv)
    if args.question is not None:
        if args.words:
            flag, words = " ".join(args.question)[:60], " ".join(args.words)[:60]
            raise UserError(f"question: given twice, as --question {flag!r} and as words, {words!r}. Give one.")
        args.question = " ".join(args.question)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Check which arguments go together. Raises UserError."""
    if args.stream and args.json:
        raise UserError("stream, json: choose one.")
    if args.stream and args.server:
        raise UserError("stream, server: choose one; a server passes an answer on when it is whole.")
    if args.best and args.checkpoint is not None:
        raise UserError("best, checkpoint: choose one.")
    if (args.csv is None) != (args.out is None):
        raise UserError("csv, out: one needs the other: --csv test.csv --out submission.csv.")
    if args.csv is not None and (args.words or args.question is not None or args.compare or args.json or args.stream):
        raise UserError("csv: takes no question, --compare, --json or --stream. Choose one way of asking.")


def show_prompt(folder: Path, question: str) -> None:
    """Print the prompt of a question; its number of tokens goes to stderr. Reads no weights. Raises UserError."""
    if not question.strip():
        raise UserError("show_prompt: needs a question. Give one.")
    recipe, tokenizer = load_recipe(folder / "trainer" / "recipe.json"), load_tokenizer(str(folder))
    text = render(recipe, build(recipe, question, {}), tokenizer)
    warn(f"prompt: {len(encode(recipe, text, tokenizer))} tokens")
    print(text, flush=True)


class Pair:
    """A checkpoint and, with --compare, the model beside it."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        device = pick_device(args.device, 0)
        sampling = {"temperature": args.temperature, "top_p": args.top_p}
        self.model = CheckpointModel(folder, device, sampling, args.max_new_tokens, args.seed)
        if args.server:
            from grpo.evaluate.on_servers import answer_on_servers  # late: most questions need none of it

            answer_on_servers(self.model, args.server, World(0, 1, 0, 1, device))
        self.language = _language(folder)
        self.base = OtherModel(args.compare, self.model, device, args.seed) if args.compare else None

    def as_json(self, question: str) -> dict[str, Any]:
        """The answers as one object."""
        ids = self.model.encode(question)
        answer = self.model.ask(ids)
        fields = {"question": question, **self._parts(answer)}
        if self.base is not None:
            fields["base"] = {"model": self.base.name, **self._parts(self.base.ask(question))}
        return fields

    def _parts(self, answer: Answer) -> dict[str, Any]:
        reasoning, final = split_reasoning(answer.text, marks_of(self.model.text_of("?", {})))
        return {"reasoning": reasoning, "answer": final, "text": answer.text, "finish": answer.finish}

    def show(self, question: str, stream: bool) -> None:
        """Print question and answers. Raises UserError, before printing, for a question that is refused."""
        ids = self.model.encode(question)
        print(f"{label(self.language, 'ask')}{question}", flush=True)
        if self.base is not None:
            base = self.base
            _print_answer(f"📎 {base.name}: ", stream, lambda on_text: base.ask(question, on_text))
        _print_answer(label(self.language, "answer"), stream, lambda on_text: self.model.ask(ids, on_text))


def _language(folder: Path) -> str:
    """The language of a checkpoint's run; English for an exported folder without the run's settings."""
    try:
        return language_of(read_state(folder)["config"])
    except UserError:
        return "en"


def _print_answer(start: str, stream: bool, ask: Callable[[Callable[[str], None] | None], Answer]) -> None:
    if not stream:
        print(f"{start}{ask(None).text.rstrip()}", flush=True)
        return
    print(start, end="", flush=True)
    kept = ""  # blanks that more text may follow

    def show(text: str) -> None:
        nonlocal kept
        text = kept + text
        kept = text[len(text.rstrip()) :]
        print(text.rstrip(), end="", flush=True)

    ask(show)
    print(flush=True)


def answer(pair: Pair, args: argparse.Namespace) -> None:
    """Ask one question, or the built-in cases. Raises UserError."""
    question = args.question if args.question is not None else " ".join(args.words)
    if question or args.question is not None or args.words:
        cases = [question]
    else:
        cases = pair.model.recipe.questions
        if not cases:
            raise UserError("question: none given, and the checkpoint holds no built-in cases. Give a question.")
    numbered = cases is pair.model.recipe.questions and not args.json
    for i, case in enumerate(cases, 1):
        if numbered:
            print(label(pair.language, "case", at=i, total=len(cases)))
        if args.json:
            print(json_line(pair.as_json(case)), flush=True)
        else:
            pair.show(case, args.stream)
        if numbered:
            print("-" * 40)


def main(argv: list[str]) -> int:
    """Answer the questions of the command line. Returns the exit code."""
    try:
        args = parse(argv)
        quiet()
        folder = choose(best_folder(args.output_dir) if args.best else args.checkpoint, args.output_dir)
        warn(f"checkpoint: {folder}")
        if args.show_prompt:
            show_prompt(folder, args.question if args.question is not None else " ".join(args.words))
            return 0
        pair = Pair(folder, args)
        if args.csv is None:
            answer(pair, args)
        else:
            alone = World(0, 1, 0, 1, pair.model.engine.model.device)
            print(predict(pair.model, folder, args.csv, args.out, args.refusal, args.batch_rows, alone), flush=True)
        return 0
    except UserError as error:
        warn(f"error: {error}")
        return error.code


if __name__ == "__main__":
    exit_with(main)
