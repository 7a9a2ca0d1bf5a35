"""GSM8K's gold answers, all of them, against a second parse of another kind; and the time to load, filter and keep.

    python benchmarks/gsm8k_golds.py train.jsonl test.jsonl

The first parse is ours: the text after the last ####. The second never looks for ####: it reads the
solution from its right end, digit by digit, and both must be one whole number. Beside it stands how often the
last sum of a solution, <<48/2=24>>, is the gold answer. Controls: one answer is changed, or its #### is cut.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]

from gsm8k_random import make_tokenizer  # noqa: E402

from grpo.config.command_line import load_config  # noqa: E402
from grpo.data.questions import length_summary, load_questions  # noqa: E402
from grpo.data.recipe import make_recipe  # noqa: E402
from grpo.errors import UserError  # noqa: E402


def second_parse(answer: str) -> int:
    """The number at the right end of a solution. Raises ValueError when there is none behind a blank."""
    text = answer.rstrip()
    digits = ""
    while text and (text[-1].isdigit() or text[-1] == ","):
        digits, text = text[-1] + digits, text[:-1]
    sign = -1 if text.endswith("-") else 1
    if not text.removesuffix("-").endswith(" "):
        raise ValueError(f"no number at the end of {answer[-40:]!r}")
    return sign * int(digits.replace(",", ""))


def wrong_golds(golds: list[str], answers: list[str]) -> list[int]:
    """Rows in which the two parses differ."""
    return [
        row
        for row, (gold, text) in enumerate(zip(golds, answers, strict=True))
        if not re.fullmatch(r"-?[\d,]+", gold) or int(gold.replace(",", "")) != second_parse(text)
    ]


def load(file: Path, tokenizer: PreTrainedTokenizerFast, *extra: str) -> tuple[list[str], str, float]:
    """Golds, the summary line and seconds of one launch."""
    cfg, _ = load_config(
        ["--config", str(PROJECT / "configs" / "gsm8k.yaml"), "--data", str(file), "--eval_split_size", "0", *extra]
    )
    start = time.perf_counter()
    questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)
    seconds = time.perf_counter() - start
    return [item.columns["answer"] for item in questions.items], length_summary(questions), seconds


def main() -> int:
    """Parse, compare, time, and break it once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="GSM8K's train.jsonl and test.jsonl")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        for file in args.files:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            answers = [row["answer"] for row in rows]
            tokenizer = make_tokenizer(rows)
            everything = ("--data_rows", "0", "--max_answer_length", "100000", "--max_prompt_length", "100000")
            golds, _, cold = load(file, tokenizer, *everything)
            wrong = wrong_golds(golds, answers)
            print(
                f"{file.name}: {len(rows)} rows, {len(golds)} golds parsed, {len(wrong)} differ from the second parse"
            )
            sums = [(re.findall(r"<<[^<>=]*=(-?[\d.]+)>>", text), gold) for text, gold in zip(answers, golds)]
            same = sum(bool(found) and float(found[-1]) == float(gold.replace(",", "")) for found, gold in sums)
            print(
                f"  in {same} of {sum(bool(found) for found, _ in sums)} solutions with sums the last one is the gold"
            )
            print(f"  read, checked, tokenized: {cold:.2f} s, {len(rows) / cold:.0f} rows/s")
            for kind, extra in (("all rows", ("--data_rows", "0")), ("the first 1,024", ())):
                _, said, seconds = load(file, tokenizer, *extra)
                print(f"  another launch, prompts kept, {kind}: {seconds:.2f} s; {said}")
            changed = [*answers[:99], answers[99] + "0", *answers[100:]]
            print(f"  control, one answer changed: {len(wrong_golds(golds, changed))} differ")
            broken = folder / file.name
            rows[99] = {**rows[99], "answer": answers[99].replace("####", "")}
            broken.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            try:
                load(broken, tokenizer, *everything)
            except UserError as error:
                print(f"  control, one #### cut: {str(error).replace(str(folder), '')}")
            else:
                print("  control, one #### cut: NOT NOTICED")
                return 1
            if wrong or len(golds) != len(rows):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
