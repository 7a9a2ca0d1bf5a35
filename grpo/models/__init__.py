"""Models and tokenizers: local folders, hub names, adapters, 4-bit weights.

In: a name or a folder of unknown origin, checked before any library opens it (folder_checks.py, lora_checks.py).
Out: a transformers model with dropout off and its tokenizer (loading.py, lora.py). Another kind of model file gets a
file here, and its checks go into folder_checks.py.
"""
