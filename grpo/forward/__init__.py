"""Forward passes: from token ids to log-probs of completion tokens, without a tensor of [B, T, V].

In: a transformers model and a `MicroBatch`. Out: log-probs [B, T] with gradient (logprobs.py). Beside the plain padded
forward there are three fast paths, each checked against the model when it is loaded: prompts that completions share are
computed once (flat_rows.py, shared_attention.py, branch_attention.py), and the head is applied in blocks
(fused_head.py). Another fast path is another file here, with a check of its own.
"""
