"""`python -m grpo.sft`: supervised training on reference solutions, before GRPO.

In: questions with solutions. Out: a checkpoint that GRPO starts from (`--model`). train.py is the loop, on the same
run, policy, backends and checkpoints as GRPO.
"""
