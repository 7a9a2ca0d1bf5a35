"""`python -m grpo.evaluate`: see command.py."""

from grpo.errors import exit_with
from grpo.evaluate.command import main

if __name__ == "__main__":
    exit_with(main)
