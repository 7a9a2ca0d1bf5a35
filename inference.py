"""Ask a trained checkpoint.

    python inference.py "小明有10个苹果，吃了3个，还剩几个？"      the newest valid checkpoint of ./output
    python inference.py --checkpoint output/checkpoint_20 "..."   another one
    python inference.py                                          the checkpoint's own built-in cases
    python inference.py --compare demo/base "..."                beside the model it was trained from
    python inference.py --csv test.csv --out submission.csv      multiple choice: ID,Answer for every row

The prompt is put exactly as in training: the recipe comes from the checkpoint. Answers go to stdout,
status to stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.checkpoints.best import best_folder
from grpo.checkpoints.choose import choose
from grpo.checkpoints.resume import read_state
from grpo.errors import UserError, warn
from grpo.evaluate.ask import Answer, CheckpointModel, OtherModel
from grpo.evaluate.extract import is_marker
from grpo.evaluate.multiple_choice import predict
from grpo.models.checks import quiet
from grpo.run.languages import label, language_of
from grpo.runtime.distributed import World, pick_device


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; anything that does not fit ends with exit code 2."""
    parser = argparse.ArgumentParser(description="Ask a trained checkpoint. Without a question: its built-in cases.")
    parser.add_argument("words", nargs="*", metavar="question", help="the question; several words are joined")
    parser.add_argument("--question", help="the question, as a flag")
    parser.add_argument("--checkpoint", "--model_dir", type=Path, help="checkpoint folder (default: newest valid one)")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where to look for checkpoints")
    parser.add_argument("--best", action="store_true", help="the checkpoint that best.json in --output_dir names")
    parser.add_argument("--compare", metavar="BASE", help="also ask this model (folder or hub name) the same prompt")
    parser.add_argument("--csv", type=Path, help="multiple-choice questions: ID, Question, Option A to D")
    parser.add_argument("--out", type=Path, help="with --csv: where ID,Answer goes")
    parser.add_argument(
        "--refusal", help="with --csv: stands for a refusal (default: the marker of the run's rewards, or ?)"
    )
    parser.add_argument("--batch_rows", type=int, default=64, help="with --csv: questions answered together")
    parser.add_argument("--max_new_tokens", "--max_tokens", type=int, help="default: as in training")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy, repeatable")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, when temperature > 0")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: question, answer, finish")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Ranges, and what contradicts what. Raises UserError."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be >= 1, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"temperature: must be a finite number >= 0, got {args.temperature}. 0 is greedy.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p: must be in (0, 1], got {args.top_p}.")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed: must be 0 to {2**63 - 1}, got {args.seed}.")
    if not 1 <= args.batch_rows <= 4096:
        raise UserError(f"batch_rows: must be 1 to 4096, got {args.batch_rows}.")
    if args.stream and args.json:
        raise UserError("stream, json: choose one.")
    if args.best and args.checkpoint is not None:
        raise UserError("best, checkpoint: choose one.")
    if (args.csv is None) != (args.out is None):
        raise UserError("csv, out: one needs the other: --csv test.csv --out submission.csv.")
    if args.csv is not None:
        if args.words or args.question is not None or args.compare or args.json or args.stream:
            raise UserError("csv: takes no question, --compare, --json or --stream. Choose one way of asking.")
        if args.refusal is not None and not is_marker(args.refusal):
            raise UserError(f"refusal: must be a text other than A to D, got {args.refusal!r}.")


class Pair:
    """A checkpoint and, where one is asked for, the model to compare it with."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        device = pick_device(args.device, 0)
        sampling = {"temperature": args.temperature, "top_p": args.top_p}
        self.asker = CheckpointModel(folder, device, sampling, args.max_new_tokens, args.seed)
        self.language = _language(folder)
        self.base = OtherModel(args.compare, self.asker, device, args.seed) if args.compare else None

    def as_json(self, question: str) -> dict[str, Any]:
        """Both answers as one object."""
        ids = self.asker.put(question)
        answer = self.asker.ask(ids)
        said: dict[str, Any] = {"question": question, "answer": answer.text, "finish": answer.finish}
        if self.base is not None:
            other = self.base.ask(question)
            said["base"] = {"model": self.base.name, "answer": other.text, "finish": other.finish}
        return said

    def show(self, question: str, stream: bool) -> None:
        """Print question and answers. A question that is refused is not printed: it may be no text at all."""
        ids = self.asker.put(question)
        print(f"{label(self.language, 'ask')}{question}", flush=True)
        if self.base is not None:
            base = self.base
            _say(f"📎 {base.name}: ", stream, lambda on_text: base.ask(question, on_text))
        _say(label(self.language, "answer"), stream, lambda on_text: self.asker.ask(ids, on_text))


def _language(folder: Path) -> str:
    """The language of a checkpoint's run; English where an exported folder no longer knows the run."""
    try:
        return language_of(read_state(folder)["config"])
    except UserError:
        return "en"


def _say(start: str, stream: bool, ask: Callable[[Callable[[str], None] | None], Answer]) -> None:
    if not stream:
        print(f"{start}{ask(None).text}", flush=True)
        return
    print(start, end="", flush=True)
    ask(lambda text: print(text, end="", flush=True))
    print(flush=True)


def answer(pair: Pair, args: argparse.Namespace) -> None:
    """Ask one question, or the built-in cases. Raises UserError."""
    question = args.question if args.question is not None else " ".join(args.words)
    if question or args.question is not None or args.words:
        cases = [question]
    else:
        cases = pair.asker.recipe.questions
        if not cases:
            raise UserError("question: none given, and the checkpoint holds no built-in cases. Give a question.")
    numbered = cases is pair.asker.recipe.questions and not args.json
    for i, case in enumerate(cases, 1):
        if numbered:
            print(label(pair.language, "case", at=i, total=len(cases)))
        if args.json:
            print(json.dumps(pair.as_json(case), ensure_ascii=False), flush=True)
        else:
            pair.show(case, args.stream)
        if numbered:
            print("-" * 40)


def main(argv: list[str]) -> int:
    """Answer what is asked. Returns the exit code."""
    try:
        args = parse(argv)
        quiet()
        folder = choose(best_folder(args.output_dir) if args.best else args.checkpoint, args.output_dir)
        warn(f"checkpoint: {folder}")
        pair = Pair(folder, args)
        if args.csv is None:
            answer(pair, args)
        else:
            alone = World(0, 1, 0, 1, pair.asker.engine.model.device)
            print(predict(pair.asker, folder, args.csv, args.out, args.refusal, args.batch_rows, alone), flush=True)
        return 0
    except UserError as error:
        warn(f"error: {error}")
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
