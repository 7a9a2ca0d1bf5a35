"""`python -m grpo.evaluate`: see command.py."""

import sys

from grpo.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
