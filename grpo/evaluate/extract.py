"""Reading the answer from a completion: strictly, between the marks that the prompt asks for; leniently, anywhere.

Strict: the text in the last complete pair of tags (<answer>…</answer>, <SOLUTION>…</SOLUTION>), or after the last
####, must be the answer and nothing else; where a run's reward asks for no marks, strict is as lenient. Lenient: the
last number, or the last letter, of the whole text. Numbers are compared as numbers (1,450 is 1450.0), choices as
letters, anything else as text. Every scan takes time linear in the length of the text.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal

from grpo.rewards import REFUSAL_TEXT

Task = Literal["number", "choice", "text"]
Marks = Literal["answer", "SOLUTION", "hash", "none"]

MAX_LENGTH = 200  # characters of a number; a bound on the cost of comparing
UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"[-+]?(?:{UNSIGNED})", re.ASCII)
NUMBER_ALONE = re.compile(rf"\s*([-+]?)\s*[$€£¥]?\s*([-+]?)({UNSIGNED})(?:\s*/\s*(\d+))?\s*[$%.]{{0,2}}\s*", re.ASCII)
LONE_LETTER = re.compile(r"(?<![A-Za-z0-9_'])[A-Da-d](?![A-Za-z0-9_'])", re.ASCII)
CAPITAL = re.compile(r"(?<![A-Za-z0-9_'])[A-D](?![A-Za-z0-9_'])", re.ASCII)
AROUND_REASONING = re.compile(  # a tag at the start or at the end
    r"\A\s*<(?:think|thinking|reasoning|start_working_out)>|</?(?:think|thinking|reasoning|end_working_out)>\s*\Z"
)
AROUND_LETTERS = " \t\r\n().:。、"  # characters that may surround a letter


def plain(text: str) -> str:
    """Full-width letters and digits as ASCII, every minus as a hyphen.

    >>> plain("−１２．５")
    '-12.5'
    """
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2013", "-")


def marks_of(*texts: str | None, rewards: Iterable[str] = ()) -> Marks:
    """The marks that a recipe's texts ask for: <SOLUTION>, else <answer>, else ####; none with last_number_reward.

    rewards: the run's, the first of which says what is right.

    >>> marks_of("Think, then <answer>\\n3\\n</answer>"), marks_of(None, "{question}")
    ('answer', 'hash')
    >>> marks_of("Is it <answer>?", rewards={"mine.py:last_number_reward@a": 1.0})
    'none'
    """
    whole = "".join(text or "" for text in texts)
    first = next(iter(rewards), "").partition("@")[0].rpartition(":")[2]
    if first == "last_number_reward":
        return "none"
    return "SOLUTION" if "<SOLUTION>" in whole else "answer" if "<answer>" in whole else "hash"


def marked(text: str, marks: Marks) -> str | None:
    """The text in the last complete pair of tags, or the line after the last ####, stripped; None if there is none.

    >>> marked("<answer>1</answer> or <answer> 2 </answer> <answer>", "answer")
    '2'
    >>> marked("2+2=4\\n#### 4\\nok", "hash")
    '4'
    """
    if marks == "none":
        return text.strip()
    if marks == "hash":
        _, found, rest = text.rpartition("####")
        return rest.strip().partition("\n")[0].strip() if found else None
    before, closed, _ = text.rpartition(f"</{marks}>")
    _, opened, inside = before.rpartition(f"<{marks}>")
    return inside.strip() if closed and opened else None


def split_reasoning(text: str, marks: Marks) -> tuple[str | None, str]:
    """(reasoning, answer), stripped, the tags around them left out. (None, the whole text) where no marks are.

    The answer is what `marked` finds, else what follows </think>.

    >>> split_reasoning("<think>\\n2+2\\n</think>\\n<answer>4</answer>\\n", "answer")
    ('2+2', '4')
    >>> split_reasoning("2+2=4\\n#### 4", "hash"), split_reasoning("2+2</think> It is 4.", "hash")
    (('2+2=4', '4'), ('2+2', 'It is 4.'))
    >>> split_reasoning(" It is 4.\\n", "hash")
    (None, 'It is 4.')
    """
    answer = marked(text, marks) if marks != "none" else None
    opening = "####" if marks == "hash" else f"<{marks}>"
    if answer is not None:
        closing = text if marks == "hash" else text.rpartition(f"</{marks}>")[0]
        reasoning = closing.rpartition(opening)[0]
    elif "</think>" in text:
        reasoning, _, answer = text.partition("</think>")
    else:
        return None, text.strip()
    return AROUND_REASONING.sub("", reasoning).strip(), answer.strip()


def number(text: str) -> Fraction | None:
    """The value of a text that is one number, with an optional currency sign, per cent sign or final point.

    >>> number(" $1,450.50. "), number("27 apples"), number("3/4")
    (Fraction(2901, 2), None, Fraction(3, 4))
    """
    match = NUMBER_ALONE.fullmatch(plain(text)) if len(text) <= MAX_LENGTH else None
    if match is None or (match[1] and match[2]):
        return None
    value = Fraction(match[3].replace(",", "")) * (-1 if "-" in (match[1], match[2]) else 1)
    if match[4] is None:
        return value
    return value / int(match[4]) if int(match[4]) else None


def last_number(text: str) -> str | None:
    """The last number of a text, as written there.

    >>> last_number("10 - 3 = 7, so $1,450.")
    '1,450'
    >>> last_number("from 5 to -8"), last_number("17-9")
    ('-8', '9')
    """
    text = plain(text)
    found = None
    for match in NUMBER.finditer(text):
        found = match
    if found is None:
        return None
    digits = found[0]
    before = text[found.start() - 1 : found.start()] if found.start() else ""
    return digits[1:] if digits[0] in "+-" and before.isalnum() else digits  # 17-9 is a difference, not -9


def marker_of(config: dict[str, Any]) -> str:
    """The text that a run's rewards take for a refusal, from its `reward_parameters`; "?" when none sets it.

    >>> marker_of({"reward_parameters": {"refusal_reward": {"marker": "拒答"}}}), marker_of({})
    ('拒答', '?')
    """
    settings = config.get("reward_parameters")
    for parameters in settings.values() if isinstance(settings, dict) else []:
        marker = parameters.get(REFUSAL_TEXT) if isinstance(parameters, dict) else None
        if isinstance(marker, str) and is_marker(marker):
            return marker
    return "?"


def is_marker(text: str) -> bool:
    """Whether a text can mark a refusal: it is not blank and not one of the letters.

    >>> is_marker("?"), is_marker(" (b) "), is_marker("")
    (True, False, False)
    """
    return bool(text.strip()) and letter(text, "") is None


def letter(text: str, refusal: str) -> str | None:
    """The choice in a text that holds nothing else: A to D or the refusal marker; None for any other text.

    >>> letter("(b).", "?"), letter(" ？ ", "?"), letter("B or C", "?")
    ('B', '?', None)
    """
    if plain(text).strip() == plain(refusal).strip():
        return refusal
    bare = plain(text).strip(AROUND_LETTERS).upper()
    return bare if bare in ("A", "B", "C", "D") else None


def last_letter(text: str) -> str | None:
    """The last A to D that stands alone in a text; lower case counts only when there is no upper case one.

    >>> last_letter("Not A, so it is (C). Got it, a bit late."), last_letter("b"), last_letter("Abba")
    ('C', 'B', None)
    """
    text = plain(text)
    found = CAPITAL.findall(text) or LONE_LETTER.findall(text)
    return found[-1].upper() if found else None


def strict(text: str, task: Task, marks: Marks, refusal: str = "?") -> str | None:
    """The answer between the marks, when they hold nothing else; None otherwise.

    >>> strict("<answer>27 apples</answer>", "number", "answer") is None
    True
    """
    if marks == "none":
        return lenient(text, task, marks, refusal)
    inside = marked(text, marks)
    if not inside:
        return None
    if task == "choice":
        return letter(inside, refusal)
    return inside if task == "text" or number(inside) is not None else None


def lenient(text: str, task: Task, marks: Marks, refusal: str = "?") -> str | None:
    """The last number or letter of the whole text; for the task text, the text between the marks or the last line.

    A choice or refusal between the marks takes precedence over letters elsewhere.

    >>> lenient("<answer>27 apples", "number", "answer"), lenient("A? B? <answer>?</answer>", "choice", "answer")
    ('27', '?')
    """
    if task == "number":
        return last_number(text)
    exact = strict(text, task, marks, refusal) if marks != "none" else None
    if exact is not None:
        return exact
    if task == "choice":
        return last_letter(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def is_correct(pred: str | None, gold: str, task: Task) -> bool:
    """Whether an extracted answer equals the gold answer.

    >>> is_correct("73.0", "73", "number"), is_correct("b", "B", "choice"), is_correct(None, "", "text")
    (True, True, False)
    """
    if pred is None:
        return False
    if task == "number":
        value = number(pred)
        return value is not None and value == number(gold)
    if task == "choice":
        return pred.strip().upper() == gold.strip()[:1].upper()
    return " ".join(pred.split()) == " ".join(gold.split())


def normal_form(answer: str | None, task: Task) -> str | None:
    """An extracted answer as a vote: 4 and 4.0 are one number, white space is one blank.

    >>> normal_form("4.0", "number"), normal_form("a  b", "number"), normal_form(None, "text")
    ('4', 'a b', None)
    """
    value = number(answer) if answer is not None and task == "number" else None
    return answer if answer is None else str(value) if value is not None else " ".join(answer.split())


def task_of(golds: Sequence[str]) -> Task:
    """The task of a set of gold answers: choice if all are letters A to D, number if all are numbers, else text.

    >>> task_of(["A", "d"]), task_of(["1,000", "-3"]), task_of(["yes", "3"])
    ('choice', 'number', 'text')
    """
    if golds and all(gold.strip().upper() in ("A", "B", "C", "D") for gold in golds):
        return "choice"
    return "number" if golds and all(number(gold) is not None for gold in golds) else "text"
