"""`python -m grpo.config`: the table of settings in docs/configuration.md."""

import sys

from grpo.config.documentation import markdown_table

if __name__ == "__main__":
    sys.stdout.write(markdown_table() + "\n")
