"""`python -m grpo.config`: the table of settings in docs/configuration.md, and recipes of TRL as settings here."""

import sys
from pathlib import Path

import yaml

from grpo.config import trl_names, trl_rewards
from grpo.config.command_line import check_yaml
from grpo.config.documentation import markdown_table
from grpo.config.from_trl import as_yaml, check_result, convert
from grpo.config.messages import OneLineParser
from grpo.errors import UserError, exit_with


def converted(file: Path, processes: int | None, rows: int | None) -> str:
    """A recipe of TRL as YAML of our settings. Raises UserError."""
    check_yaml(file, known=None)
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    processes = processes or options.pop("num_processes", None)
    if type(processes) is not int or processes < 1 or (rows is not None and rows < 1):
        raise UserError(
            f"processes: must be the number of training processes of the recipe, got {processes}. Say --processes 8; "
            "batch sizes are per process in TRL."
        )
    recipe = convert(options, processes, rows)
    check_result(recipe)
    return as_yaml(recipe, file.name)


def main(argv: list[str]) -> int:
    """Write what was asked for on stdout. Returns the exit code."""
    parser = OneLineParser(
        prog="python -m grpo.config",
        allow_abbrev=False,
        description="Without arguments: the table of settings in docs/configuration.md.",
    )
    parser.add_argument("--from_trl", type=Path, metavar="RECIPE", help="YAML of TRL or open-r1, written as ours")
    parser.add_argument("--processes", type=int, help="training processes that the recipe was written for")
    parser.add_argument("--rows", type=int, help="questions in the data set: epochs become max_steps")
    parser.add_argument("--trl_names", action="store_true", help="the tables in docs/from_trl.md")
    try:
        args = parser.parse_args(argv)
        if args.from_trl is None and (args.processes, args.rows) != (None, None):
            raise UserError("processes, rows: they belong to --from_trl RECIPE.")
        if args.from_trl is not None:
            text = converted(args.from_trl, args.processes, args.rows)
        elif args.trl_names:
            text = f"{trl_names.markdown_table()}\n\n### Reward functions\n\n{trl_rewards.markdown_table()}\n"
        else:
            text = markdown_table() + "\n"
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    exit_with(main)
