"""`python -m grpo.plan`: see command.py."""

import sys

from grpo.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
