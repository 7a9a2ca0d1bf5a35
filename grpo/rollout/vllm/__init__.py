"""Rollouts by vLLM: a server in an environment of its own, and the engine that asks it.

In: the step's requests and the policy's weights, over HTTP. Out: completions, as every engine returns them.

    wire      what both sides write and read: arrays in JSON, a stream of tensors
    server    python -m grpo.rollout.vllm.server: vLLM behind a few routes, all guarded by one token
    inside    what runs in vLLM's own processes: the sampling distribution, new weights
    client    one server as the trainer sees it: requests, weights, retries, errors of one line
    engine    the engine of train.py: which server gets which rows
    child     a server that the trainer starts itself, on its own devices

`server` and `inside` run where vLLM is installed, the rest where training runs; versions of torch and transformers
need not agree.
"""
