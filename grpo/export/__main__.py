"""python -m grpo.export: see grpo/export/command.py."""

import signal
import sys

from grpo.errors import exit_with
from grpo.export.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the temporary folder is removed
    exit_with(main)
