"""Ask a trained checkpoint.

    python inference.py "小明有10个苹果，吃了3个，还剩几个？"      the newest valid checkpoint of ./output
    python inference.py --checkpoint output/checkpoint_20 "..."   another one
    python inference.py                                          the checkpoint's own built-in cases

The prompt is put exactly as in training: the recipe comes from the checkpoint. Answers go to stdout,
status to stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from grpo.checkpoint import newest_valid, verify
from grpo.console import warn
from grpo.distributed import pick_device
from grpo.errors import UserError
from grpo.models import check_lengths, check_vocabulary, load_model, load_tokenizer, quiet, stop_token_ids
from grpo.prompts import Recipe, build, encode, load_recipe, render
from grpo.rollout import Request
from grpo.rollout.native import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.stream import TokenPrinter


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; anything that does not fit ends with exit code 2."""
    parser = argparse.ArgumentParser(description="Ask a trained checkpoint. Without a question: its built-in cases.")
    parser.add_argument("words", nargs="*", metavar="question", help="the question; several words are joined")
    parser.add_argument("--question", help="the question, as a flag")
    parser.add_argument("--checkpoint", "--model_dir", type=Path, help="checkpoint folder (default: newest valid one)")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where to look for checkpoints")
    parser.add_argument("--max_new_tokens", "--max_tokens", type=int, help="default: as in training")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy, repeatable")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, when temperature > 0")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: question, answer, finish")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    args = parser.parse_args(argv)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be >= 1, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"temperature: must be a finite number >= 0, got {args.temperature}. 0 is greedy.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p: must be in (0, 1], got {args.top_p}.")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed: must be 0 to {2**63 - 1}, got {args.seed}.")
    if args.stream and args.json:
        raise UserError("stream, json: choose one.")
    return args


def choose(args: argparse.Namespace) -> Path:
    """The checkpoint to ask. Raises UserError when there is none."""
    if args.checkpoint is not None:
        try:
            found = (args.checkpoint / "config.json").is_file()
        except (OSError, ValueError) as error:  # a path too long, or none at all
            raise UserError(f"checkpoint: not a path: {error}. Give a folder such as output/checkpoint_20.") from None
        if not found:
            raise UserError(f"checkpoint: no model in {args.checkpoint}. Give a folder such as output/checkpoint_20.")
        problem = verify(args.checkpoint)
        if problem is not None:
            raise UserError(f"checkpoint: {args.checkpoint} cannot be trusted: {problem}. Choose another checkpoint.")
        return args.checkpoint
    newest = newest_valid(args.output_dir, warn)
    if newest is None:
        raise UserError(
            f"checkpoint: none in {args.output_dir}. Train one first (python train.py), or use --checkpoint."
        )
    return newest


class Asker:
    """A checkpoint, loaded and ready."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.args = args
        self.recipe: Recipe = load_recipe(folder / "trainer" / "recipe.json")
        self.tokenizer = load_tokenizer(str(folder))
        model = load_model(str(folder), pick_device(args.device, 0))
        max_new_tokens = args.max_new_tokens or self.recipe.max_generate_length
        check_lengths(model, self.recipe.max_prompt_length, max_new_tokens)
        check_vocabulary(model, self.tokenizer)
        self.engine = NativeEngine(model, stop_token_ids(model, self.tokenizer), max_new_tokens, args.seed)
        self.sampling = Sampling(args.temperature, top_p=args.top_p, logit_clamp=self.recipe.logit_clamp)

    def put(self, question: str) -> tuple[int, ...]:
        """The question as token ids. Raises UserError for one that is empty, too long, or no text."""
        if not question.strip():
            raise UserError("question: it is empty. Ask something.")
        text = render(self.recipe, build(self.recipe, question, {}), self.tokenizer)
        ids = tuple(encode(self.recipe, text, self.tokenizer))
        if not ids:
            raise UserError("question: the tokenizer makes no token of it. Ask something else.")
        if len(ids) > self.recipe.max_prompt_length:
            raise UserError(f"question: {len(ids)} tokens, the checkpoint was trained for at most "
                            f"{self.recipe.max_prompt_length} (max_prompt_length). Shorten it.")  # fmt: skip
        return ids

    def ask(self, question: str, ids: tuple[int, ...], on_text: Callable[[str], None] | None = None) -> dict[str, str]:
        """Answer one question, given as text and as what `put` made of it."""
        printer = None if on_text is None else TokenPrinter(self.tokenizer, on_text)
        [completion] = self.engine.generate([Request(0, 0, 0, ids)], self.sampling, on_tokens=printer)
        answer = self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        return {"question": question, "answer": str(answer), "finish": completion.finish}


def show(asker: Asker, question: str, args: argparse.Namespace) -> None:
    """Ask and print. A question that is refused is not printed: it may be no text at all."""
    ids = asker.put(question)
    if args.json:
        print(json.dumps(asker.ask(question, ids), ensure_ascii=False), flush=True)
        return
    print(f"❓ 问题: {question}", flush=True)
    if args.stream:
        print("💡 回答: ", end="", flush=True)
        asker.ask(question, ids, on_text=lambda text: print(text, end="", flush=True))
        print(flush=True)
    else:
        print(f"💡 回答: {asker.ask(question, ids)['answer']}", flush=True)


def main(argv: list[str]) -> int:
    """Ask one question, or the built-in cases. Returns the exit code."""
    try:
        args = parse(argv)
        quiet()
        torch.set_grad_enabled(False)
        folder = choose(args)
        warn(f"checkpoint: {folder}")
        asker = Asker(folder, args)
        question = args.question if args.question is not None else " ".join(args.words)
        if question or args.question is not None or args.words:
            show(asker, question, args)
            return 0
        cases = asker.recipe.questions
        if not cases:
            raise UserError("question: none given, and the checkpoint holds no built-in cases. Give a question.")
        for i, case in enumerate(cases, 1):
            if not args.json:
                print(f"[测试 {i}/{len(cases)}]")
            show(asker, case, args)
            if not args.json:
                print("-" * 40)
        return 0
    except UserError as error:
        warn(f"error: {error}")
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
