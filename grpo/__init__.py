"""Group Relative Policy Optimization (arXiv 2402.03300) under torchrun, on one CPU core or many GPUs.

One step, as data (train.py is this list in code):

    prompts(step) -> generate -> score -> gather -> advantages -> plan -> update -> log

Packages, from the lowest layer up; each imports only from packages above it in this list (tests/project/test_rooms.py).
What enters and leaves a package stands in its __init__.py.

    types, errors, randomness,
    strict_json        the data that travels; one-line errors; keyed random numbers; JSON of unknown origin
    config/            settings: defaults, YAML, command line, checks
    forward/           token ids -> log-probs of completions, without [B, T, V]; shared prompts, fused head
    runtime/           ranks and collectives; heartbeats, signals, memory
    models/            loading models, tokenizers, adapters
    rewards/           calling reward functions, isolated in processes of their own
    data/              files -> questions -> prompts
    rollout/           prompts -> completions: the engine, its caches, sampling
    reward_library/    reward functions to choose from
    training/          scores -> advantages -> micro-batches -> loss -> update; backends/
    checkpoints/       writing, choosing and resuming checkpoints
    plan/              python -m grpo.plan: memory and traffic before a run
    doctor/            python -m grpo.doctor: what is wrong with a run, from its logs
    run/               folders, console, trackers/, exit codes
    evaluate/          python -m grpo.evaluate; asking a checkpoint
    export/            python -m grpo.export: merged weights, GGUF, hub
    view/              python -m grpo.view: runs in a browser
    sft/               python -m grpo.sft: supervised training before GRPO
    replay             python -m grpo.replay: a skipped update, computed again

Vocabulary
    step         one turn of the loop            minibatch    rows of one optimizer step
    group        completions of one prompt       micro-batch  rows of one backward
    row          completion n of the step        data row     a question's index in the data
    policy       the model being trained         reference    its frozen start (KL only)
    engine       what samples completions        backend      what sums gradients over ranks

Shapes
    P prompts a step, G completions a prompt, N = P*G rows (row n = p*G + g), W ranks,
    B rows of a micro-batch, L tokens of its longest row, T of its longest completion, V vocabulary.
    Tensors [B, T] are aligned to targets: column t belongs to the t-th completion token.

Where the next one goes: ARCHITECTURE.md, "Where new things go".
"""

import os
import sys


def _accept_any_text() -> None:
    """Every command passes here. A console shows what its encoding has, the rest as escapes: no character ends a run.

    Arguments are read as UTF-8 also where the locale has no such characters (C with PYTHONUTF8=0).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for at, arg in enumerate(getattr(sys, "argv", [])):
        if any("\udc80" <= letter <= "\udcff" for letter in arg):  # bytes that the locale could not read
            try:
                sys.argv[at] = os.fsencode(arg).decode("utf-8")
            except UnicodeError:
                continue


_accept_any_text()
