"""`python -m grpo.view`: see command.py."""

import sys

from grpo.view.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
