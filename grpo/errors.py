"""Errors for users: one line (setting, value given, values allowed, what to do), an exit code, no traceback."""

import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

EXIT_BUG = 1  # an exception that is none of the others, with its traceback
EXIT_USER = 2  # config, data, reward or checkpoint: the user can correct it
EXIT_STALLED = 74  # no progress on any rank, or a rollout server is lost
EXIT_PREEMPTED = 75  # stopped by a signal; the same command continues
EXIT_DIVERGED = 76  # too many bad steps in a row
EXIT_CORRUPTED = 77  # weights or optimizer state changed in memory between updates


class UserError(Exception):
    """An error that the user can correct. Printed as one line; the process exits with `code`."""

    code = EXIT_USER
    on_one_rank = False  # True: raised on one rank only, which therefore prints it itself


class Preempted(UserError):
    """The run was stopped by a signal. Not a failure: the same command continues it."""

    code = EXIT_PREEMPTED


class Lost(UserError):
    """What the run needs beside itself is gone, such as a rollout server; all ranks left after a checkpoint."""

    code = EXIT_STALLED


class Diverged(UserError):
    """Too many updates in a row had non-finite numbers."""

    code = EXIT_DIVERGED


class Corrupted(UserError):
    """A rank's weights or optimizer state changed after its last update."""

    code = EXIT_CORRUPTED


def printable(text: str) -> str:
    """A text that a terminal shows and does not act on; line breaks, tabs and spaces of any width stay.

    Control characters, surrogates and marks of direction become the replacement character.

    >>> printable("a\\x1b[2Jb\\u202ec\\u3000\\n")
    'a\ufffd[2Jb\ufffdc\\u3000\\n'
    """
    if text.isprintable():
        return text
    kept = "\n\t"
    return "".join(
        letter if letter.isprintable() or letter in kept or unicodedata.category(letter) == "Zs" else "\ufffd"
        for letter in text
    )


def warn(line: str) -> None:
    """Print a line on stderr, on any rank."""
    print(printable(line), file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not blank, or its class.

    >>> first_line(ValueError("\\n not found \\n see above")), first_line(KeyError())
    ('not found', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def exit_with(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a command on the arguments of this process and end with its code.

    Where the reader of its output has left, as in `| head`, it ends in silence, with the code of SIGPIPE.
    """
    code: int | str | None
    try:
        try:
            code = main(sys.argv[1:])
        except SystemExit as ended:  # --help
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail again
        code = 128 + signal.SIGPIPE
    sys.exit(code)
