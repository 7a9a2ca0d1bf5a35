"""A checkpoint in the forms that other programs open.

In: a verified checkpoint. Out: a folder with merged weights, 4-bit weights, an adapter or GGUF files. A new form is a
file here and its entry in command.py.

    python -m grpo.export --checkpoint output/checkpoint_20 --to merged_16bit --out exported
    python -m grpo.export --checkpoint output/checkpoint_20 --to gguf --quant f16,q4_k_m --out exported

command          the command line: what is asked for, refused before anything is loaded, written aside, renamed
source           the checkpoint that is exported: verified, opened, an adapter merged into its base
folders          merged_16bit, merged_4bit, lora: folders that transformers or peft opens
gguf_model       gguf: settings and tensors of the architectures that were checked against llama.cpp
gguf_tokenizer   gguf: tokens, merges, and which of llama.cpp's ways to cut text is the tokenizer's own
gguf_file        gguf: the files, what llama.cpp quantises, and what it is asked afterwards
card             README.md, the model card: base, data, rewards, curve, metrics, config
push             sending an export to a hub

One method alone is written into --out itself, several into a folder each. MANIFEST.json lists what is there.
"""
