"""`python -m grpo.evaluate`, and everything that asks a checkpoint: one question, a CSV, a held-out set.

In: a checkpoint and questions. Out: answers, and their accuracy with its interval. held_out.py measures the policy
during training; the command is command.py; inference.py uses ask.py. How answers are read from text: extract.py.
"""
