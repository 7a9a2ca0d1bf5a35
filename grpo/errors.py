"""Errors for users: one line (setting, value given, values allowed, what to do), an exit code, no traceback."""

import sys

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


def warn(line: str) -> None:
    """Print a line on stderr, on any rank."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not blank, or its class.

    >>> first_line(ValueError("\\n not found \\n see above")), first_line(KeyError())
    ('not found', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
