"""Questions: files and datasets of unknown origin -> prompts, ready to be sampled from.

In: a data file, a folder or a hub dataset, and the recipe of the prompt. Out: `Questions`
(questions.py), from which each step takes its `Prompt`s. A new data format goes into `load_rows` in sources.py, a new
form of gold answer into `READERS` in gold_answers.py.
"""
