"""Where the value of each setting came from: the comments in what `--print_config` prints."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from grpo.config.settings import PROJECT, Config
from grpo.config.sft_section import OWN, SUFFIX, SftSettings

COMMAND_LINE = "command line"


def origins_of(given: Iterable[tuple[str, str]], origins: Mapping[str, str]) -> dict[str, str]:
    """Setting -> where its value is from. given: (name, file or command line) in the order in which they win.

    origins: of settings that had a value before. A part of a mapping leaves the rest as it was.

    >>> origins_of([("rewards", "a.yaml"), ("rewards.f_reward", "command line")], {"lr": "algorithm: x"})
    {'lr': 'algorithm: x', 'rewards': 'a.yaml, command line'}
    """
    found = dict(origins)
    for name, where in given:
        setting, _, part = name.partition(".")
        before = found.get(setting, where)
        found[setting] = f"{before}, {where}" if part and not before.endswith(where) else where
    return found


def origins_of_stage(
    origins: Mapping[str, str], values: Mapping[str, Any], section: Mapping[str, Any]
) -> dict[str, str]:
    """The same for the supervised stage: its section replaces what stands outside; output folders get a suffix."""
    found = {name: where for name, where in origins.items() if name in values}
    for name, value in values.items():
        if name in section:
            found[name] = f"{origins['sft']}, sft"
        elif isinstance(value, str) and value.endswith(SUFFIX) and name not in OWN:
            found[name] = f"{found[name]}, with {SUFFIX}" if name in found else f"default with {SUFFIX}"
    return found


def short_path(path: str) -> str:
    """A configuration file as it is named in a comment: below the working folder or the project, else in full."""
    for base in (Path.cwd(), PROJECT):
        with contextlib.suppress(OSError, ValueError):
            return Path(path).resolve().relative_to(base).as_posix()
    return path


def commented(text: str, origins: Mapping[str, str]) -> str:
    """A dump of settings, with a comment behind each that is not at its default.

    >>> commented("lr: 2.0e-06\\nrewards:\\n  a: 1.0\\nseed: 42\\n", {"lr": "command line", "rewards": "a.yaml"})
    'lr: 2.0e-06  # command line\\nrewards:  # a.yaml\\n  a: 1.0\\nseed: 42\\n'
    """
    defaults = {**dataclasses.asdict(Config()), **dataclasses.asdict(SftSettings())}
    values, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines(keepends=True)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        name = key.value
        if name not in origins or (name in defaults and values[name] == defaults[name]):
            continue
        is_block = value.style in ("|", ">") if isinstance(value, yaml.ScalarNode) else not value.flow_style
        last = key.start_mark.line if is_block else value.end_mark.line  # a text in quotes may have several lines
        lines[last] = f"{lines[last].rstrip()}  # {_printable(origins[name])}\n"
    return "".join(lines)


def _printable(text: str) -> str:
    """In one line, and of characters that the console has."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)
