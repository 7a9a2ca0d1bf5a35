"""Prints what is wrong with a run, from what it logged, and which setting to change.

    python -m grpo.doctor runs/NAME [--language en|zh]

The run may be unfinished, old or copied from elsewhere. Nothing is written.
"""

from pathlib import Path

from grpo.config.messages import OneLineParser
from grpo.doctor.findings import diagnose
from grpo.doctor.recording import read_run
from grpo.doctor.report import LANGUAGES, language_of, lines_of
from grpo.doctor.rules import RULES
from grpo.errors import UserError, warn


def main(argv: list[str]) -> int:
    """Read a run's folder, print the findings. Returns the exit code: 0, also with findings; 2 where it is no run."""
    parser = OneLineParser(prog="python -m grpo.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="folder of a run, such as runs/demo")
    parser.add_argument("--language", choices=sorted(LANGUAGES), help="language of the report; default: the run's")
    try:
        args = parser.parse_args(argv)
        run = read_run(Path(args.run))
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    language = args.language or language_of(run.setting("console_language"))
    for line in lines_of(run, diagnose(run, RULES), language):
        print(line)
    return 0
