"""`python -m grpo.doctor`: see command.py."""

import sys

from grpo.doctor.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
