"""The results of an evaluation: a line per question, the figures at the end, the JSONL file, comparing two of them."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grpo.errors import UserError
from grpo.evaluate import statistics
from grpo.evaluate.ask import Answer
from grpo.evaluate.extract import Marks, Task, is_correct, lenient, normal_form, strict
from grpo.run.languages import label
from grpo.strict_json import parse_json

MAX_LINE = 2**24  # characters of one line of a results file
SHOWN = 60  # characters of an answer on the console

Graded = list[tuple[str, str, bool]]  # question, gold answer, correct; of each question's first completion


@dataclass(frozen=True)
class Rules:
    """How completions are read."""

    task: Task
    marks: Marks
    refusal: str = "?"
    language: str = "en"  # of the printed lines


@dataclass(frozen=True)
class Result:
    """One completion, read strictly and leniently."""

    question: str
    gold: str
    full: str
    pred: str | None
    correct: bool
    lenient_correct: bool
    index: int  # among the question's completions


def grade(question: str, gold: str, answers: Sequence[Answer], rules: Rules) -> list[Result]:
    """Read and compare every completion of one question."""
    results = []
    for index, answer in enumerate(answers):
        exact = strict(answer.text, rules.task, rules.marks, rules.refusal)
        loose = lenient(answer.text, rules.task, rules.marks, rules.refusal)
        correct, lenient_correct = (is_correct(pred, gold, rules.task) for pred in (exact, loose))
        results.append(Result(question, gold, answer.text, exact, correct, lenient_correct, index))
    return results


class Progress:
    """The running accuracy, printed question by question."""

    def __init__(self, total: int, language: str = "en"):
        self.total = total
        self.language = language
        self.done = self.correct = 0

    def line(self, first: Result) -> str:
        """Count a question, given its first completion, and return its line.

        >>> Progress(100).line(Result("3*9?", "27", "", "27", True, True, 0))
        '[001/100] ✅=1 | Acc=100.00% | Pred: 27 | GT: 27'
        """
        self.done += 1
        self.correct += first.correct
        none = label(self.language, "none")
        return f"[{self.done:0{len(str(self.total))}d}/{self.total}] " + label(
            self.language,
            "progress",
            correct=self.correct,
            share=self.correct / self.done,
            pred=_short(first.pred or none),
            gold=_short(first.gold or none),
        )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= SHOWN else words[:SHOWN] + "…"


def share(part: int, whole: int) -> str:
    """A share with its counts.

    >>> share(88, 100), share(0, 0)
    ('88.00% (88/100)', 'none (0/0)')
    """
    return f"{part / whole:.2%} ({part}/{whole})" if whole else f"none ({part}/{whole})"


def final_lines(results: Sequence[Result], rules: Rules) -> list[str]:
    """The lines printed at the end: accuracies of the first completions; pass@k and maj@k over all completions."""
    firsts = [result for result in results if result.index == 0]
    total, exact = len(firsts), sum(result.correct for result in firsts)
    text = partial(label, rules.language)
    lines = [text("final", share=share(exact, total))]
    for name, correct in (("strict", exact), ("lenient", sum(result.lenient_correct for result in firsts))):
        low, high = statistics.wilson(correct, total)
        lines.append(text(name, share=share(correct, total), low=low, high=high))
    if rules.task == "choice":
        refused = sum(result.pred == rules.refusal for result in firsts)
        unreadable = sum(result.pred is None for result in firsts)
        answered = total - refused - unreadable
        shares = {"refused": share(refused, total), "answered": share(exact, answered)}
        lines.append(text("choices", **shares, unreadable=share(unreadable, total)))
    if len(results) > len(firsts):
        figures = sampled(results, rules).items()
        lines.append("; ".join(f"{name}: {value:.2%}" + with_error(error) for name, (value, error) in figures))
    return lines


def with_error(error: float) -> str:
    """A standard error behind its value; nothing where one question gives none.

    >>> with_error(0.0312), with_error(math.nan)
    (' ± 3.12%', '')
    """
    return "" if math.isnan(error) else f" ± {error:.2%}"


def sampled(results: Sequence[Result], rules: Rules) -> dict[str, tuple[float, float]]:
    """pass@k and maj@K with their standard errors, by strict extraction."""
    num_each = max(result.index for result in results) + 1  # completions per question
    groups = [results[at : at + num_each] for at in range(0, len(results), num_each)]
    right = [[result.correct for result in group] for group in groups]
    votes = [[normal_form(result.pred, rules.task) for result in group] for group in groups]
    return statistics.of_several_answers(right, votes)


def write_results(path: Path, results: Iterable[Result], with_index: bool) -> None:
    """Write one JSON object per completion: q, gold, pred, full, correct (and sample, its index). Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            row = {
                "q": result.question,
                "gold": result.gold,
                "pred": result.pred,
                "full": result.full,
                "correct": result.correct,
            }
            file.write(json.dumps(row | ({"sample": result.index} if with_index else {}), ensure_ascii=False) + "\n")


def read_results(path: Path) -> Graded:
    """The results in a file of `write_results`. Raises UserError naming the line."""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in iter(lambda: file.readline(MAX_LINE), ""):
                row = parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("correct"), bool):
                    raise ValueError("expected an object with q, gold and correct")
                if row.get("sample", 0) == 0:
                    rows.append((str(row["q"]), str(row["gold"]), row["correct"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"compare: {path}, after {len(rows)} results: {error}. Give a file written with --out, or a checkpoint."
        ) from None
    return rows


def comparison(names: Sequence[str], first: Graded, second: Graded) -> str:
    """The lines that compare two systems on the same questions, paired. Raises UserError when the questions differ."""
    if [row[:2] for row in first] != [row[:2] for row in second]:
        raise UserError(
            f"compare: {names[0]} and {names[1]} did not answer the same questions ({len(first)} and {len(second)}). "
            "Evaluate both on one file: --data."
        )
    if not first:
        raise UserError(f"compare: {names[0]} holds no results. Evaluate at least one question.")
    pairs = [(a[2], b[2]) for a, b in zip(first, second, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    difference, low, high = statistics.paired_difference(only_a, only_b, len(pairs))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    return (
        f"A: {names[0]}: {share(both + only_a, len(pairs))}\n"
        f"B: {names[1]}: {share(both + only_b, len(pairs))}\n"
        f"paired on {len(pairs)} questions: both right {both}, only A {only_a}, only B {only_b}, neither {neither}\n"
        f"B - A: {100 * difference:+.2f} points, 95% interval {100 * low:+.2f} to {100 * high:+.2f}; "
        f"McNemar exact p = {statistics.mcnemar(only_a, only_b):.4g}"
    )
