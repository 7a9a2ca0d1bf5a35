"""`python -m grpo.view`: see command.py."""

from grpo.errors import exit_with
from grpo.view.command import main

if __name__ == "__main__":
    exit_with(main)
