"""Rules about what the model writes: ends, lengths, repetition, languages, variety."""

import re
from collections import Counter
from statistics import fmean

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording, Row

MIN_STEPS = 4
MIN_ROWS = 8  # logged completions below which a share says nothing
CUT = 0.2  # share of completions cut at the limit
NEVER = 0.99
COSTS = 0.1  # of the range of rewards: what being cut costs
LONGER, SHORTER = 1.8, 0.5  # times the length at the start
RISEN_Z = 2.0  # standard errors
EMPTY = 3.0  # tokens
REPEATED, REPETITIVE = 0.5, 0.2  # share of repeated pieces in a text; share of such texts
MIN_PIECES = 12
MAX_CHARACTERS = 4000  # of a text that is looked at
SWITCHED = 0.15  # share of completions in another script than their question's
OTHER_SCRIPT, LATIN_AMONG_OTHERS = 0.2, 0.7  # share of a text's letters; code, tags and formulas are Latin anywhere
MIN_LETTERS = 8
ALIKE = 0.5  # share of groups whose completions are all the same text
TOP = 0.85  # of the range of rewards
SCRIPTS = (  # first code point, last, name
    (0x41, 0x24F, "Latin"),
    (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"),
    (0x590, 0x5FF, "Hebrew"),
    (0x600, 0x6FF, "Arabic"),
    (0x900, 0x97F, "Devanagari"),
    (0xE00, 0xE7F, "Thai"),
    (0x3040, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"),
)


def never_ends(run: Recording) -> Evidence | None:
    """No completion ends by itself."""
    cut = run.all("completions/truncated")
    if len(cut) < MIN_STEPS or fmean(cut) < NEVER:
        return None
    return Evidence(
        {"share": fmean(cut), "limit": _limit(run), "steps": len(cut)}, run.last_rows[-1] if run.last_rows else None
    )


def truncated(run: Recording) -> Evidence | None:
    """Many completions are cut at the limit, and being cut costs reward."""
    cut = run.last("completions/truncated")
    if len(run.steps) < MIN_STEPS or not cut or fmean(cut) < CUT or fmean(run.all("completions/truncated")) >= NEVER:
        return None
    rewarded = [row for row in run.rows if row.reward is not None]
    at_limit = [row for row in rewarded if row.finish == "length"]
    ended = [row for row in rewarded if row.finish == "stop"]
    low, high = run.range_of()
    mean_cut = fmean([row.reward for row in at_limit]) if at_limit else None  # type: ignore[misc]
    mean_ended = fmean([row.reward for row in ended]) if ended else None  # type: ignore[misc]
    if mean_cut is None or (mean_ended is not None and mean_ended - mean_cut < COSTS * (high - low)):
        return None
    values = {"share": fmean(cut), "limit": _limit(run), "cut": mean_cut, "ended": mean_ended, **run.span()}
    return Evidence(values, at_limit[-1] if at_limit else None)


def _limit(run: Recording) -> int:
    return int(run.number("max_generate_length", max(run.all("completions/length_max"), default=0)))


def length_explosion(run: Recording) -> Evidence | None:
    """Completions grow, and the task's reward does not."""
    length, task = run.rise("completions/length_mean"), run.rise(run.task)
    if len(run.steps) < MIN_STEPS or length is None or length.last < LONGER * length.first or length.z < RISEN_Z:
        return None
    if task is not None and task.z >= RISEN_Z:
        return None
    values = {"first": length.first, "last": length.last, "name": _task_name(run)}
    values |= {"before": task.first if task else None, "after": task.last if task else None}
    return Evidence(values, run.last_rows[-1] if run.last_rows else None)


def length_collapse(run: Recording) -> Evidence | None:
    """Completions shrink, and the task's reward does not rise, or nothing is left of them."""
    length, task = run.rise("completions/length_mean"), run.rise(run.task)
    if len(run.steps) < MIN_STEPS or length is None or length.last > SHORTER * length.first or length.z > -RISEN_Z:
        return None
    if task is not None and task.z >= RISEN_Z and length.last > EMPTY:
        return None
    values = {"first": length.first, "last": length.last, "name": _task_name(run)}
    values |= {"before": task.first if task else None, "after": task.last if task else None}
    return Evidence(values, run.last_rows[-1] if run.last_rows else None)


def _task_name(run: Recording) -> str:
    return run.reward_names[0] if run.reward_names else "reward"


def repetition(run: Recording) -> Evidence | None:
    """Completions that say the same again and again."""
    rows = run.last_rows
    found = [row for row in rows if repeated_share(row.completion) >= REPEATED]
    if len(rows) < MIN_ROWS or len(found) < REPETITIVE * len(rows):
        return None
    worst = max(found, key=lambda row: repeated_share(row.completion))
    return Evidence({"share": len(found) / len(rows), "rows": len(rows), **run.span()}, worst)


def repeated_share(text: str) -> float:
    """Share of a text's pieces of four words that occurred before; of 12 characters where there are few spaces.

    >>> repeated_share("so it is 4 " * 20) > 0.9, repeated_share("Tom has 5 eggs. He buys 3 and eats 2, so he has 6.")
    (True, 0.0)
    """
    text = text[-MAX_CHARACTERS:]
    words = text.split()
    if len(words) >= len(text) / 15:
        pieces = list(zip(words, words[1:], words[2:], words[3:]))
    else:
        pieces = [tuple(text[at : at + 12]) for at in range(len(text) - 11)]  # type: ignore[misc]
    if len(pieces) < MIN_PIECES:
        return 0.0
    return 1 - len(set(pieces)) / len(pieces)


def language_switching(run: Recording) -> Evidence | None:
    """Completions in another script than their question's."""
    rows = run.last_rows
    found = [(row, script) for row in rows if (script := other_script(row.question, row.completion))]
    if len(rows) < MIN_ROWS or len(found) < SWITCHED * len(rows):
        return None
    row, script = found[-1]
    asked = (scripts(row.question) or Counter(["?"])).most_common(1)[0][0]
    return Evidence(
        {"share": len(found) / len(rows), "rows": len(rows), "script": script, "asked": asked, **run.span()}, row
    )


def scripts(text: str) -> Counter[str]:
    """Letters of a text by script; tags are left out.

    >>> scripts("<answer>价格 is 4</answer>")
    Counter({'Han': 2, 'Latin': 2})
    """
    text = re.sub(r"</?\w{1,40}>", " ", text[:MAX_CHARACTERS])
    found: Counter[str] = Counter()
    for letter in text:
        if letter.isalpha():
            code = ord(letter)
            found[next((name for begin, end, name in SCRIPTS if begin <= code <= end), "other")] += 1
    return found


def other_script(question: str, completion: str) -> str | None:
    """The script that a completion is written in to a large part and its question is not; None: there is none.

    >>> other_script("How many eggs are left?", "他还有三个鸡蛋，因为他吃了两个。")
    'Han'
    >>> other_script("还剩几个？", "还剩三个鸡蛋。x = 3") is None
    True
    """
    asked, said = scripts(question), scripts(completion)
    letters = said.total()
    if letters < MIN_LETTERS or not asked:
        return None
    for script, count in said.most_common():
        share = LATIN_AMONG_OTHERS if script == "Latin" else OTHER_SCRIPT
        if count >= share * letters and asked[script] < asked.total() * OTHER_SCRIPT / 2:
            return script
    return None


def identical_completions(run: Recording) -> Evidence | None:
    """The completions of most groups are all the same text, and are not all right."""
    groups = run.groups(run.last_rows)
    alike = [group for group in groups if len({row.completion for row in group}) == 1 and len(group) > 1]
    if len(groups) < 4 or len(alike) < ALIKE * len(groups):
        return None
    low, high = run.range_of()
    rewards = [row.reward for group in groups for row in group if row.reward is not None]
    if rewards and fmean(rewards) >= low + TOP * (high - low):
        return None
    values = {"share": len(alike) / len(groups), "groups": len(groups), "temperature": run.number("temperature", 1.0)}
    entropy = run.last("entropy")
    return Evidence(values | {"entropy": fmean(entropy) if entropy else None, **run.span()}, _worst(alike))


def _worst(groups: list[list[Row]]) -> Row:
    return min((group[0] for group in groups), key=lambda row: row.reward if row.reward is not None else 0.0)
