"""What we say to users: one line (what, got, allowed, what to do), an exit code, no traceback."""

EXIT_USER = 2  # config, data, reward or checkpoint: the user can mend it
EXIT_PREEMPTED = 75  # asked to stop; saved
EXIT_DIVERGED = 76  # too many bad steps in a row


class UserError(Exception):
    """Something the user can mend. Printed as one line; the process exits with `code`."""

    code = EXIT_USER


class Diverged(UserError):
    """Non-finite numbers in too many updates in a row."""

    code = EXIT_DIVERGED
