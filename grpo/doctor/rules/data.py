"""Rules about questions: held-out ones that are trained on, repeated ones, contradictions, those left out."""

import re

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording

LEAK = re.compile(r"warning: eval_data: (\d+) of the (\d+) questions of (.*) are in the training data")
KEPT = re.compile(r"data .*: (\d+) questions kept, (\d+) dropped as too long")
PARTS = re.compile(r"(\d+) (?:questions kept|dropped|held out)")
LEFT_OUT = 0.1  # share of the questions
REPEATED = 0.02  # share of the logged groups


def held_out_leak(run: Recording) -> Evidence | None:
    """Held-out questions that are trained on too, as the run found at its start."""
    for line in run.log:
        if found := LEAK.search(line):
            shared, total = int(found[1]), int(found[2])
            return Evidence({"shared": shared, "total": total, "share": shared / max(1, total), "file": found[3]})
    return None


def _num_questions(run: Recording) -> tuple[int, int] | None:
    """Questions kept, and dropped as too long."""
    found = next((found for line in run.log if (found := KEPT.search(line))), None)
    return (int(found[1]), int(found[2])) if found else None


def left_out(run: Recording) -> Evidence | None:
    """Questions dropped because their prompts are too long."""
    numbers = _num_questions(run)
    line = next((line for line in run.log if KEPT.search(line)), "")
    total = sum(map(int, PARTS.findall(line)))  # those left out for other reasons were looked at too
    if numbers is None or numbers[1] < LEFT_OUT * total:
        return None
    kept, dropped = numbers
    values = {"kept": kept, "dropped": dropped, "share": dropped / total}
    return Evidence(values | {"limit": run.setting("max_prompt_length", "?")})


def duplicates(run: Recording) -> Evidence | None:
    """One question in several places of the data: seen again in an epoch that should hold each once."""
    groups = _first_epoch(run)
    places: dict[str, set[tuple[int, int]]] = {}
    for place, question in groups.items():
        places.setdefault(question, set()).add(place)
    repeated = {question: found for question, found in places.items() if len(found) > 1}
    again = sum(len(found) - 1 for found in repeated.values())
    if not repeated or again < max(2, REPEATED * len(groups)):
        return None
    question = max(repeated, key=lambda text: len(repeated[text]))
    values = {"again": again, "groups": len(groups), "times": len(repeated[question]), "question": question}
    return Evidence(values)


def _first_epoch(run: Recording) -> dict[tuple[int, int], str]:
    """(step, prompt of the step) -> question, of the steps that are surely in the first epoch; {}: not known."""
    size = run.group_size
    numbers = _num_questions(run)
    if not size or numbers is None or run.setting("filter_groups", "keep") != "keep":
        return {}
    per_step = max((row.row // size for row in run.rows), default=0) + 1
    last = numbers[0] // per_step
    return {(row.step, row.row // size): row.question for row in run.rows if row.step <= last}


def gold_differs(run: Recording) -> Evidence | None:
    """One question with several gold answers."""
    golds: dict[str, set[str]] = {}
    for row in run.rows:
        if row.gold is not None:
            golds.setdefault(row.question, set()).add(row.gold)
    differing = {question: found for question, found in golds.items() if len(found) > 1}
    if not differing:
        return None
    question = min(differing)
    values = {"count": len(differing), "questions": len(golds), "question": question}
    return Evidence(values | {"golds": ", ".join(sorted(differing[question])[:3])})
