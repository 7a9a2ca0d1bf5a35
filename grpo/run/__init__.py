"""A run's surroundings: its folders, its log, its trackers, the exit code.

In: a `Config` and what training measures. Out: lines on the console and in train.log, metrics.jsonl, TensorBoard
events, logged completions. trackers/__init__.py says how a tracker is added.
"""
