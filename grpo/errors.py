"""What we say to users: one line (what, got, allowed, what to do), an exit code, no traceback."""

import sys

EXIT_USER = 2  # config, data, reward or checkpoint: the user can mend it
EXIT_STALLED = 74  # no progress on any rank
EXIT_PREEMPTED = 75  # asked to stop; the same command continues
EXIT_DIVERGED = 76  # too many bad steps in a row
EXIT_CORRUPTED = 77  # memory changed behind our back


class UserError(Exception):
    """Something the user can mend. Printed as one line; the process exits with `code`."""

    code = EXIT_USER
    on_one_rank = False  # True: the other ranks do not know of it, so the rank itself says so


class Preempted(UserError):
    """Asked to stop by a signal. Not a failure: the same command continues."""

    code = EXIT_PREEMPTED


class Diverged(UserError):
    """Non-finite numbers in too many updates in a row."""

    code = EXIT_DIVERGED


class Corrupted(UserError):
    """A rank's weights or optimizer state are not what its last update left."""

    code = EXIT_CORRUPTED


def warn(line: str) -> None:
    """A line on stderr, from any rank."""
    print(line, file=sys.stderr, flush=True)
