"""A run's surroundings: its folders, its log, its trackers, the exit code.

In: a `Config` and what training measures. Out: lines on the console and in train.log, metrics.jsonl, TensorBoard
events, logged completions. A new tracker is a file in trackers/ and its line in trackers/__init__.py.
"""
