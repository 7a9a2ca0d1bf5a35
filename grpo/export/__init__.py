"""A checkpoint in the formats that other programs open.

In: a verified checkpoint. Out: a folder with merged weights, 4-bit weights, an adapter or GGUF files. A new format is a
file here and an entry in command.py.

    python -m grpo.export --checkpoint output/checkpoint_20 --to merged_16bit --out exported
    python -m grpo.export --checkpoint output/checkpoint_20 --to gguf --quant f16,q4_k_m --out exported

command          the command line: checks before anything is loaded, writing into a temporary folder, renaming it
source           the checkpoint that is exported: verified, opened, an adapter merged into its base
folders          merged_16bit, merged_4bit, lora: folders that transformers or peft opens
gguf_model       gguf: settings and tensors of the architectures that were checked against llama.cpp
gguf_tokenizer   gguf: tokens, merges, and the name of llama.cpp's pre-tokenizer that equals the tokenizer's
gguf_file        gguf: writing the files, quantising with llama.cpp, checking a file with it
serving_template the prompt recipe as a chat template, for servers (--for_serving)
push             sending an export to a hub, with its model card (grpo/checkpoints/card.py)

A single method is written into --out itself, several into a folder each. MANIFEST.json lists the files.
"""
