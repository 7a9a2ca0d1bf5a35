"""`python -m grpo.evaluate`, and everything that asks a checkpoint: one question, a CSV, a held-out set.

In: a checkpoint and questions. Out: answers, and their accuracy with its interval. inference.py, train.py and
grpo/sft/ use this package.

    command          the command line of `python -m grpo.evaluate`
    arguments        argument types and the output file that it shares with inference.py
    ask              a loaded checkpoint that answers questions
    stream           printing an answer while it is sampled
    extract          reading the answer from a completion's text
    report           grading, the printed lines, the JSONL of results
    statistics       intervals and tests of accuracies
    multiple_choice  `inference.py --csv`
    held_out         the accuracy of the policy during training, on one set or several, greedy or sampled
"""
