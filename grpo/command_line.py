"""Reading the command line: defaults < --config file.yaml < --key value, whatever their order; one line on errors."""

import contextlib
import dataclasses
import io
from pathlib import Path

import jsonargparse

from grpo.config import DEMO, Config, find_path
from grpo.config_checks import check
from grpo.errors import UserError


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description="GRPO training. Defaults < --config file.yaml < --key value.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, applied before the command line")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def load_config(argv: list[str]) -> tuple[Config, str | None]:
    """Read the command line. Returns the config and, when the demo applies, a notice to show first.

    Raises UserError for anything that does not fit; `--help` and `--print_config` exit with 0.
    """
    names = {arg.split("=")[0] for arg in argv}
    notice = None
    if not names & {"--config", "--model", "--data", "--help", "-h"}:
        notice = "No --config, --model or --data given: running the demo, configs/demo.yaml."
        argv = ["--config", str(DEMO), *argv]
    argv = _config_first(argv)
    for here, arg in enumerate(argv):
        if arg == "--config":
            file = find_path(argv[here + 1])
            if file is None or not file.is_file():
                raise UserError(
                    f"config: no such file {argv[here + 1]!r}. Give a YAML file, such as configs/gsm8k.yaml."
                )
            argv[here + 1] = str(file)
    parser = _parser()
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = parser.parse_args(argv)
            cfg = parser.instantiate(parsed)
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError) as error:
        raise UserError(_one_line(error)) from None
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config)}
    if values["run_name"] is None:
        files = [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--config"]
        values["run_name"] = Path(files[-1]).stem if files else "grpo"
    config = Config(**values)
    check(config)
    return config, notice


def _config_first(argv: list[str]) -> list[str]:
    """Move `--config file` before the overrides, so that their order does not matter."""
    files: list[str] = []
    rest: list[str] = []
    args = iter(argv)
    for arg in args:
        if arg.startswith("--local_rank=") or arg.startswith("--local-rank="):
            continue  # the deepspeed launcher says it here; LOCAL_RANK in the environment says the same
        if arg == "--config":
            files += [arg, next(args, "")]
        elif arg.startswith("--config="):
            files += ["--config", arg.removeprefix("--config=")]
        else:
            rest.append(arg)
    return files + rest


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"config: {text} (see train.py --help)"
