"""`python -m grpo.doctor`: see command.py."""

from grpo.doctor.command import main
from grpo.errors import exit_with

if __name__ == "__main__":
    exit_with(main)
