"""`python -m grpo.plan`: see command.py."""

from grpo.errors import exit_with
from grpo.plan.command import main

if __name__ == "__main__":
    exit_with(main)
