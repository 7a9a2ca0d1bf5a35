"""`python -m grpo.doctor`: what is wrong with a run, from what it logged.

In: a run's folder (metrics.jsonl, and of rollouts, run.json, exit.json and train.log what there is). Out: findings,
each with its evidence and the setting to change. rules/ has a file for each theme; a new rule is a function there, its
line in the table `RULES`, its words in texts_en.py and texts_zh.py, and recorded runs in tests/doctor/cases.py.
Imports neither torch nor transformers.
"""
