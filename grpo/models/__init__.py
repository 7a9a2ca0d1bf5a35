"""Models and tokenizers: local folders, hub names, adapters, 4-bit weights.

In: a name or a folder of unknown origin, looked at before any library opens it (folder_checks.py, lora_checks.py).
Out: a transformers model with dropout off and its tokenizer (loading.py, lora.py). Another kind of model file is
another file here, and what it may hold is checked in folder_checks.py.
"""
