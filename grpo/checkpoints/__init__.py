"""Checkpoints: written whole or not at all, chosen, and continued exactly.

In: a `Policy` between two steps. Out: output_dir/checkpoint_N, a Hugging Face folder with the optimizer state beside
it; and from such a folder the same policy again, on any backend and any number of ranks (resume.py). `take_snapshot` in
contents.py decides what a checkpoint holds; card.py writes the model card of one that leaves this machine.
"""
