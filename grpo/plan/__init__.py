"""`python -m grpo.plan`: what a run will need, before anything loads.

In: a `Config`, the model's config.json, a number of GPUs. Out: memory of each GPU and bytes sent in a step, by part.
memory.py holds the formulas: add there what a new backend or setting costs.
"""
