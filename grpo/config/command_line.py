"""Reading the command line: defaults < --config file.yaml < --key value, in any order; errors are one line."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from grpo.config.algorithm import NAMED, PRESETS, is_known, preset_notice
from grpo.config.checks import check, field_names
from grpo.config.exit_file import output_dir_of, write_exit
from grpo.config.messages import MANY_DIGITS, meant, setting_error
from grpo.config.names import OLD_NAMES, find_path
from grpo.config.origins import COMMAND_LINE, commented, origins_of, origins_of_stage, short_path
from grpo.config.settings import DEMO, SCALING, Config
from grpo.config.sft_section import (
    OF_ROLLOUTS,
    OWN,
    SftSettings,
    check_section,
    check_stage,
    refuse_rollout_setting,
    stage_config,
    stage_values,
)
from grpo.errors import UserError

MAX_YAML_BYTES = 2**18
MAX_YAML_DEPTH = 4
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one that jsonargparse takes, which refuses a little more
SETTING_KINDS = {**typing.get_type_hints(Config), **OWN}
SETTING_KINDS |= {old: SETTING_KINDS[new] for old, new in OLD_NAMES.items()}


class _Parser(jsonargparse.ArgumentParser):
    """Reads YAML files as UTF-8, whatever the locale's encoding is; --print_config says where values come from."""

    origins: Mapping[str, str] = {}  # of settings that were given

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return self.parse_string(Path(path).read_text(encoding="utf-8"), str(path), *args, **kwargs)

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """What --print_config prints: a setting that may be written in two ways is shown in one, as Config holds it."""
        cfg, origins = cfg.clone(), dict(self.origins)
        if isinstance(getattr(cfg, "scale_rewards", None), bool):
            cfg.scale_rewards = SCALING[cfg.scale_rewards]
        for old, new in OLD_NAMES.items():
            if old in cfg and new not in origins:
                cfg[new], origins[new] = cfg.pop(old), origins.get(old, "")
        return commented(super().dump(cfg, *args, **kwargs), origins)


def _parser() -> _Parser:
    parser = _empty_parser(
        "train.py",
        "GRPO training. Defaults < --config file.yaml < --key value. --show_prompt N prints the prompt of question N, "
        "counted from 0, and ends.",
    )
    parser.add_class_arguments(Config, as_group=False)
    for old, new in OLD_NAMES.items():
        kind = typing.get_type_hints(Config)[new]
        parser.add_argument(
            f"--{old}", type=kind, default=argparse.SUPPRESS, help=f"Old name of {new}. Set one of them."
        )
    return parser


def _sft_parser() -> _Parser:
    parser = _empty_parser(
        "python -m grpo.sft",
        "Supervised training before GRPO. Defaults < --config file.yaml < its sft section < --key value. "
        "--show_prompt N prints the prompt of question N, counted from 0, with the text to be learned, and ends.",
    )
    parser.add_class_arguments(Config, as_group=False, skip={"sft", *OF_ROLLOUTS})
    parser.add_class_arguments(SftSettings, as_group=False)
    return parser


def _empty_parser(prog: str, description: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,  # --mod is an error, not --model
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, applied before the command line")
    return parser


def load_config(argv: list[str]) -> tuple[Config, str | None]:
    """Read the command line. Returns the config and, when the demo is run, a notice to print first.

    Raises UserError for a setting that is unknown or wrong; `--help` and `--print_config` exit with 0.
    """
    argv, _ = take_show_prompt(argv)
    names = {arg.split("=")[0] for arg in argv}
    notice = None
    if not names & {"--config", "--model", "--data", "--help", "-h"}:
        notice = "No --config, --model or --data given: running the demo, configs/demo.yaml."
        argv = ["--config", str(DEMO), *argv]
    argv = _files_first(argv)
    parser, algorithm = _parser(), _last_value("algorithm", argv)
    parser.set_defaults(PRESETS.get(algorithm, {}))
    parser.origins = origins_of(_places(argv), dict.fromkeys(PRESETS.get(algorithm, {}), f"algorithm: {algorithm}"))
    values = _new_names(_parse(parser, argv), argv)
    _name_run(values, argv, "grpo")
    section = values.pop("sft")
    config = Config(**values)
    check(config)
    if section:
        check_stage(values, section)
    return config, "\n".join(filter(None, [notice, preset_notice(config)])) or None


def load_sft_config(argv: list[str]) -> tuple[Config, str | None]:
    """Read the command line of the supervised stage, like `load_config`; its own settings are in the field `sft`."""
    argv, _ = take_show_prompt(argv)
    for arg in argv:
        refuse_rollout_setting(arg.removeprefix("--").partition("=")[0].partition(".")[0] if arg[:2] == "--" else "")
    argv = _files_first(argv)
    files = [word for i, arg in enumerate(argv[:-1]) if arg == "--config" for word in argv[i : i + 2]]
    values = _new_names(_parse(_parser(), files), files)
    section = values.pop("sft")
    check_section(section)
    _name_run(values, files, "grpo")
    parser, rest = _sft_parser(), argv[len(files) :]
    stage = stage_values(values, section)
    parser.set_defaults(stage)
    parser.origins = origins_of(_places(rest), origins_of_stage(origins_of(_places(files), {}), stage, section))
    return stage_config(_parse(parser, rest)), None


def _parse(parser: jsonargparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Settings by name. Raises UserError."""
    _refuse_repeated_keys(argv)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = vars(parser.instantiate(parser.parse_args(argv)))
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise setting_error(error, argv, SETTING_KINDS, parser.prog) from None
    for name, value in parsed.items():
        setting = OLD_NAMES.get(name, name)
        if NAMED.get(setting) and isinstance(value, str) and not is_known(setting, value):
            kinds = {**SETTING_KINDS, name: Literal[NAMED[setting]]}  # those of its values that have a name
            raise setting_error(ValueError(f'Parser key "{name}": value: {value}'), argv, kinds, parser.prog)
    return {name: value for name, value in parsed.items() if name != "config"}


def _refuse_repeated_keys(argv: list[str]) -> None:
    """Refuse a mapping that names a key twice, of which a reader would keep the last. Raises UserError."""
    for before, arg in zip(["", *argv], argv, strict=False):
        name, _, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if not value.lstrip().startswith("{"):
            continue
        try:
            root = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            continue  # no mapping: said where its type is checked
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        count = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in count.items() if times > 1]:
            setting = name.removeprefix("--")[:60]
            raise UserError(f"{setting}: {twice[0][:60]!r} is set twice, got {value[:60]!r}. Keep one of them.")


def _new_names(values: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """Settings that were given by an old name, under the present one. Raises UserError when both names were used."""
    given = {name for name, _, _ in _given(argv)}
    for old, new in OLD_NAMES.items():
        if old not in values:
            continue
        value = values.pop(old)
        if new in given and values[new] != value:
            raise UserError(f"{old}: it is the old name of {new}, got {value} and {values[new]}. Set one of them.")
        values[new] = value
    return values


def _given(argv: list[str]) -> Iterator[tuple[str, str, str]]:
    """Names and texts of the settings that files and the command line have, and the place of each; the last one wins.

    A place is a file's path, or "command line".
    """
    for arg, after in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg == "--config":
            try:
                root = yaml.compose(Path(after).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except yaml.YAMLError:
                continue  # said where the file is parsed
            pairs = root.value if isinstance(root, yaml.MappingNode) else []
            yield from ((key.value, str(value.value), short_path(after)) for key, value in pairs)
        elif arg.startswith("--"):
            yield name, value if equals else after, COMMAND_LINE


def _places(argv: list[str]) -> list[tuple[str, str]]:
    """Name and place of each setting that is given."""
    return [(name, place) for name, _, place in _given(argv)]


def _last_value(name: str, argv: list[str]) -> str:
    """The text that a setting has; empty: it is not given."""
    return ([""] + [value for given, value, _ in _given(argv) if given == name])[-1]


def _name_run(values: dict[str, Any], argv: list[str], default: str) -> None:
    if values["run_name"] is None:
        files = [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--config"]
        values["run_name"] = Path(files[-1]).stem if files else default


def take_show_prompt(argv: list[str]) -> tuple[list[str], int | None]:
    """Take `--show_prompt N`, which is not a setting, out of argv. Raises UserError when N is not a whole number.

    >>> take_show_prompt(["--lr", "1", "--show_prompt", "3"]), take_show_prompt(["--show_prompt=0"])
    ((['--lr', '1'], 3), ([], 0))
    """
    rest: list[str] = []
    row = None
    args = iter(argv)
    for arg in args:
        if arg != "--show_prompt" and not arg.startswith("--show_prompt="):
            rest.append(arg)
            continue
        value = arg.partition("=")[2] if "=" in arg else next(args, "")
        if not re.fullmatch(r"\d{1,9}", value, re.A):
            raise UserError(f"show_prompt: must be the number of a question, from 0 on, got {value[:60]!r}.")
        row = int(value)
    return rest, row


def refuse_bad_settings(argv: list[str], load: Callable[[list[str]], object] = load_config) -> None:
    """End the process with one line when settings are wrong, before torch is imported, which takes seconds.

    Where output_dir exists, exit.json holds the code. Under a launcher `run_main` does all this, on one rank.
    """
    if "RANK" in os.environ:
        return
    try:
        load(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        folder = output_dir_of(argv, load is load_sft_config)
        with contextlib.suppress(OSError, ValueError):
            if folder.is_dir():  # an earlier run's code must not stand there; a folder is not made for a mistake
                write_exit(folder, error.code, str(error))
        sys.exit(error.code)


def check_yaml(file: Path, known: Collection[str] | None) -> None:
    """Refuse what a YAML reader accepts or fails on: repeated keys, references, tags, deep nesting.

    known: the names that may stand at the top level; None: any.

    Only the stream of events is read; no object is built. Raises UserError.
    """
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"config: {file} has more than {MAX_YAML_BYTES} bytes. Give a YAML file of settings.")
        levels: list[_Level] = []
        is_mapping = False
        for event in yaml.parse(file.read_text(encoding="utf-8"), Loader=LOADER):
            problem = _yaml_problem(event, levels, known)
            if problem is not None:
                raise UserError(f"config: {file}, line {event.start_mark.line + 1}: {problem}")
            is_mapping = is_mapping or isinstance(event, yaml.MappingStartEvent)
        if not is_mapping:
            raise UserError(f"config: {file} holds no settings. Give lines such as `lr: 1.0e-6`.")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(
            f"config: {file}{line}: this is no YAML ({str(error.problem)[:100]}). A blank follows each colon; "
            "texts with other signs stand in quotes."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"config: {file} cannot be read: {reason}. Mend the file, or give another.") from None


@dataclasses.dataclass
class _Level:
    """An open mapping or sequence."""

    keys: set[str] | None  # of a mapping; None for a sequence
    key_follows: bool = True


def _yaml_problem(event: yaml.Event, levels: list[_Level], known: Collection[str] | None) -> str | None:
    if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
        levels.pop()
    if isinstance(event, yaml.AliasEvent):
        return "references (*name) are not read. Write the value out."
    if not isinstance(event, yaml.NodeEvent):
        return None
    if getattr(event, "tag", None) is not None:
        return f"tags are not read, got {str(event.tag)[:60]!r}. Write the plain value."
    top = levels[-1] if levels else None
    if top is None and (isinstance(event, yaml.SequenceStartEvent) or getattr(event, "value", None)):
        return "expected settings, one `name: value` a line."
    if top is not None and top.keys is not None:
        top.key_follows = not top.key_follows
        if not top.key_follows:  # this was the key
            key = event.value if isinstance(event, yaml.ScalarEvent) else None
            if key is None or key in top.keys:
                return "a key must be a name." if key is None else f"{key[:60]!r} is set twice. Keep one of them."
            top.keys.add(key)
            if known is not None and len(levels) == 1 and key.split(".")[0] not in known:
                end = meant(key, known) or " (see train.py --help)"
                whole = ". Convert a recipe: python -m grpo.config --from_trl FILE" if end.startswith(":") else ""
                return f"unknown setting {key[:60]!r}{end}{whole}"
    if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
        if len(levels) >= MAX_YAML_DEPTH:
            return "nested too deeply for any setting."
        levels.append(_Level(set() if isinstance(event, yaml.MappingStartEvent) else None))
    elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and MANY_DIGITS.fullmatch(event.value):
        return f"a number of {len(event.value)} digits fits no setting, got {event.value[:20]}…"
    return None


def _files_first(argv: list[str]) -> list[str]:
    """`_config_first`, and find and check the files. Raises UserError."""
    argv = _config_first(argv)
    for i, arg in enumerate(argv):
        if arg == "--config":
            file = find_path(argv[i + 1])
            if file is None or not file.is_file():
                raise UserError(
                    f"config: no such file {argv[i + 1][:200]!r}. Give a YAML file, such as configs/gsm8k.yaml."
                )
            check_yaml(file, [*field_names(), *OLD_NAMES])
            argv[i + 1] = str(file)
    return argv


def _config_first(argv: list[str]) -> list[str]:
    """Move `--config file` before the overrides, so that their order does not matter."""
    files: list[str] = []
    rest: list[str] = []
    args = iter(argv)
    for arg in args:
        if arg.startswith("--local_rank=") or arg.startswith("--local-rank="):
            continue  # from the deepspeed launcher, which also sets LOCAL_RANK in the environment
        if arg == "--config":
            files += [arg, next(args, "")]
        elif arg.startswith("--config="):
            files += ["--config", arg.removeprefix("--config=")]
        else:
            rest.append(arg)
    return files + rest
