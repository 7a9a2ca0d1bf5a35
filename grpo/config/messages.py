"""One line for settings that cannot be read: the setting, what was given, what is allowed, what to do.

The parsers of jsonargparse and argparse describe types in Python's words. Here the setting's name is taken from their
text, its value from the command line or the file as the user wrote it, and what is allowed from the setting's type.
"""

import argparse
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from grpo.config.checks import has_type, in_words, shown
from grpo.config.trl_names import hint, value_hint
from grpo.errors import UserError

MAX_SHOWN = 60  # characters of a value
MANY_DIGITS = re.compile(r"[-+]?[\d_]{20,}")
COLON = re.compile(r":(?=[^\s:,{}\"']+\s*[,}]|[\[{])")  # the last one before a value that follows without a space
NEEDS_VALUE = re.compile(r"argument (?:-\w, )?--?([\w.-]+).*: expected (?:one|at least one) argument")
OF_ARGUMENT = re.compile(r"argument ([^:]+): (.*)", re.S)
PYTHON_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "Path": "a path"}


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and where."""

    name: str  # of the setting, or setting.key
    text: str
    where: str = ""  # the file and line; "" for the command line


def setting_error(error: Exception, argv: Sequence[str], kinds: Mapping[str, Any], prog: str) -> UserError:
    """What jsonargparse refuses, as one line. kinds: the type of every setting by name."""
    text = " ".join(str(error).split())
    see = f"(see {prog} --help)"
    found = re.search(r'Parser key "([\w.-]+)', text) or NEEDS_VALUE.search(text)
    name = found[1] if found else ""
    kind = kinds.get(name.partition(".")[0])
    if "unrecognized arguments:" in text:
        return UserError(f"config: {_unknown(text.partition('unrecognized arguments:')[2], kinds)} {see}")
    if kind is None:
        return UserError(f"config: {too_many_digits(argv)}{text if len(text) <= 400 else text[:400] + ' …'} {see}")
    if (dotted := next((arg for arg in argv if arg.startswith(f"--{name}.")), None)) and dict not in _origins(kind):
        word = dotted.partition("=")[0][:MAX_SHOWN]
        return UserError(f"config: unknown setting {word!r}: {name} takes {in_words(kind)}, and has no parts {see}")
    given = _given(name, argv, text)
    if given.name != name and typing.get_origin(kind) is dict:  # --rewards.name value
        name, kind = given.name, typing.get_args(kind)[1]
    if NEEDS_VALUE.search(text):
        return UserError(f"{name}: no value given, must be {in_words(kind)}. Write --{name} VALUE {see}.")
    text = given.text if len(given.text) <= MAX_SHOWN else given.text[:MAX_SHOWN] + "…"
    words = " ".join(given.text.split())
    advice = value_hint(name, words.strip("'\"")) or _advice(words, kind)
    line = f"{name}: must be {in_words(kind)}, got {text!r}{given.where}{advice and '. ' + advice} {see}."
    return UserError("".join(letter if letter.isprintable() else "\ufffd" for letter in line))


def _origins(kind: Any) -> set[Any]:
    return {typing.get_origin(one) or one for one in (kind, *typing.get_args(kind))}


def too_many_digits(argv: Sequence[str]) -> str:
    """Names the setting whose number has too many digits: the error of the conversion does not name it."""
    for before, arg in zip(["", *argv], argv):
        name, _, value = arg.rpartition("=")
        if MANY_DIGITS.fullmatch(value):
            return f"{name or before}: at most 19 digits: "
    return ""


def _given(name: str, argv: Sequence[str], text: str) -> Given:
    """What was given for a setting: on the command line, else in a file; of several, the one that the text quotes."""
    found: list[Given] = []
    for i, arg in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else ""
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg == "--config":
            found += _in_file(name, Path(following))
        elif arg.startswith("--") and key.partition(".")[0] == name:
            found.append(Given(key, value if equals else following))
    quoted = text.rpartition("alue:")[2]
    meant = [given for given in found if given.text.strip("'\" ") and given.text in quoted]
    return [Given(name, quoted.strip()), *found, *meant[:1]][-1]


def _in_file(name: str, file: Path) -> list[Given]:
    try:
        content = file.read_text(encoding="utf-8")
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return [
        Given(
            name,
            " ".join(content[value.start_mark.index : value.end_mark.index].split()) or "null",
            f" ({file}, line {key.start_mark.line + 1})",
        )
        for key, value in pairs
        if key.value == name
    ]


def _advice(text: str, kind: Any) -> str:
    """What to write instead, where the value shows what was meant; else an empty text."""
    if typing.get_origin(kind) is dict:
        return _advice_on_mapping(text, kind)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if text.lower() in ("null", "none", "~"):
        return "Leave it out for the default"
    if of_list := next((one for one in kinds if typing.get_origin(one) is list), None):
        words = [word for word in re.split(r"[,\s]+", text.strip("[]")) if word]
        strange = [word for word in words if _choices(of_list) and word not in _choices(of_list)]
        as_list = f"[{', '.join(words)}]"
        if strange:
            return _did_you_mean(strange[0], _choices(kind)) or f"{strange[0][:MAX_SHOWN]} is none of them"
        if as_list != text and "\\" not in text and has_type(_parsed(as_list), kind):
            return f"Write {as_list}"
        return f"Write {in_words(of_list)}" + (" in quotes" if of_list == list[str] else "")
    if dict[str, str] in kinds and isinstance(_parsed(text), list):
        return "Write {name: file, …}"
    if str in kinds and not has_type(_parsed(text), kind):
        return f"Write it in quotes: {chr(34)}{text[:MAX_SHOWN]}{chr(34)}"
    if {int, float} & set(kinds):
        return _advice_on_number(text, float in kinds)
    if text.endswith(".py"):
        return f"Write {text[:MAX_SHOWN]}:FUNCTION"
    return _did_you_mean(text, _choices(kind))


def _did_you_mean(text: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, choices, 1)
    return f"Did you mean {near[0]}?" if near else ""


def _advice_on_mapping(text: str, kind: Any) -> str:
    spaced = COLON.sub(": ", text)
    if spaced != text and has_type(_parsed(spaced), kind):
        return f"A space is missing after a colon: write {spaced[:MAX_SHOWN]}"
    value, inner = _parsed(text), typing.get_args(kind)[1]
    if isinstance(value, dict):
        wrong = [(key, one) for key, one in value.items() if not has_type(one, inner)]
        return f"{str(wrong[0][0])[:MAX_SHOWN]} has {shown(wrong[0][1])}, must be {in_words(inner)}" if wrong else ""
    return "Write {name: value}, in quotes on the command line"


def _advice_on_number(text: str, fractions: bool) -> str:
    if fractions and re.fullmatch(r"[-+]?\d+,\d+", text):
        return f"Write {text.replace(',', '.')}"
    if fractions and re.fullmatch(r"\d+(\.\d+)?%", text):
        return f"Write {float(text[:-1]) / 100:g}"
    if fractions and text.lower().strip("+-.") in ("nan", "inf", "infinity"):
        return "It must be finite"
    if not fractions and re.fullmatch(r"\d+(\.\d*)?(e\+?\d{1,2})?", text, re.I) and float(text) == int(float(text)):
        return f"Write {int(float(text))}"
    return ""


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None


def _choices(kind: Any) -> list[str]:
    """All values of the Literals in a type, as text."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return list(map(str, inner))
    return [choice for one in inner for choice in _choices(one)]


def _unknown(rest: str, names: Mapping[str, Any]) -> str:
    """The first word that belongs to no setting, and the setting that may be meant."""
    word = rest.split()[0] if rest.split() else rest
    name = word.lstrip("-").partition("=")[0].partition(":")[0]
    if not word.startswith("-"):
        return f"{word[:MAX_SHOWN]!r} belongs to no setting. Write --name value, texts with blanks in quotes"
    others = [one for one in names if f"--{one}" != word]
    return f"unknown setting {word[:MAX_SHOWN]!r}{meant(name, others, '--')}"


def meant(name: str, names: Collection[str], dashes: str = "") -> str:
    """The end of a line about an unknown setting: the one that may be meant; empty when there is none.

    >>> meant("learning_rate", ["lr"]), meant("sed", ["seed"], "--"), meant("x", ["seed"])
    (": TRL's name, here it is lr", '; did you mean --seed?', '')
    """
    spelt = name.replace("-", "_")
    if spelt != name and spelt in names:
        return f"; did you mean {dashes}{spelt}?"
    if of_trl := hint(name, names):
        return f": {of_trl}"
    near = difflib.get_close_matches(spelt, names, 1)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors of one line, for the commands that are no runs."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{self._sentence(' '.join(message.split()))} (see {self.prog} --help).")

    def _sentence(self, message: str) -> str:
        names = {flag.lstrip("-"): None for action in self._actions for flag in action.option_strings}
        if "unrecognized arguments:" in message:
            return _unknown(message.partition("unrecognized arguments:")[2], names).replace("setting", "argument")
        if message.startswith("the following arguments are required:"):
            return f"{message.partition(': ')[2].replace('--', '')}: missing, it must be given"
        found = OF_ARGUMENT.fullmatch(message)
        if found is None:
            return message
        name, reason = found[1].split("/")[0].lstrip("-"), found[2]
        if "expected" in reason:
            return f"{name}: no value given. Write {found[1].split('/')[0]} VALUE"
        if choice := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", reason, re.S):
            allowed = choice[2].replace("'", "")
            near = difflib.get_close_matches(choice[1].strip("'"), allowed.split(", "), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{name}: must be one of {allowed}, got {choice[1][:MAX_SHOWN]}{hint}"
        if value := re.fullmatch(r"invalid (\w+) value: (.*)", reason, re.S):
            return f"{name}: must be {PYTHON_TYPES.get(value[1], value[1])}, got {value[2][:MAX_SHOWN]}"
        return f"{name}: {reason}"
