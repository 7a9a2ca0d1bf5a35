"""Group Relative Policy Optimization (arXiv 2402.03300) under torchrun, on one CPU core or many GPUs.

One step, as data (train.py is this list in code):

    prompts(step) -> generate -> score -> gather -> advantages -> plan -> update -> log

Map
    config, config_checks,
    command_line                what the user says, and what we say back
    data, data_sources, data_folders,
    hub, answers, data_filters,
    prompts, prompt_cache,
    show_prompt                 rows -> Prompt: text, token ids, the columns that rewards see
    data_checks, templates,
    untrusted                   what others wrote: files looked at, chat templates rendered under limits
    rollout/                    Prompt -> Completion: engines, sampling, chunks shared over ranks
    rewards/, reward_library/,
    scoring                     Completion -> scores -> the table that every rank sees
    advantages                  rewards of whole groups -> advantages
    planning, batching          rows -> minibatches -> micro-batches, the exchange between ranks
    flattening, attention, crown  rows without padding, prompts that completions share computed once
    logprobs, fused_head, losses  token log-probs without [B, T, V]; PPO clip, k3, denominators
    policy, backends/           the trained model; who sums gradients and steps the optimizer
    guards, replay              numbers that are not finite: skip together, keep the evidence, look again
    integrity, out_of_memory    bits that flip; memory that runs out
    checkpoint, saving, resume  written whole or not at all, in the background; and continuing exactly
    startup, liveness, stopping ranks that disagree, die or hang; being asked to stop
    run, journal, launch        folders, what a run says, exit codes
    metrics, trackers/, console numbers -> TensorBoard, JSON lines, the terminal
    labels                      what is said about completions, in the task's language
    fingerprints                what identifies a run
    sft, sft_settings, sft_data,
    sft_policy, packing         supervised training before GRPO, on the same machinery
    evaluate, best              held-out accuracy while training; which checkpoint did best
    asking, stream, predict     a checkpoint asked: one answer as it is made, or a whole CSV
    export/                     a checkpoint for other programs: merged, 4-bit, LoRA, GGUF, hub
    examination, extraction,
    evaluation_report, estimates  a checkpoint measured: answers read, counted, compared
    adapters, adapter_files,
    untrusted_adapters          LoRA: a frozen model and what is trained beside it; its two files
    quantization, offload       4-bit weights, 8-bit moments; what waits in CPU memory
    distributed, loading,
    models, types               ranks and collectives; loading models; the nouns that travel
    plan, memory, memory_shape  what a run will need, before it starts

Vocabulary
    step         one turn of the loop            minibatch    rows of one optimizer step
    group        completions of one prompt       micro-batch  rows of one backward
    policy       the model being trained         reference    its frozen start (KL only)
    engine       what samples completions        backend      what sums gradients over ranks

Shapes
    P prompts a step, G completions a prompt, N = P*G rows (row n = p*G + g), W ranks,
    B rows of a micro-batch, L tokens of its longest row, T of its longest completion, V vocabulary.
    Tensors [B, T] are aligned to targets: column t belongs to the t-th completion token.

Where the next one goes
    loss         losses.py: its entry in ROW_WEIGHTS, and its name in config.py
    reward       reward_func.py, or any file as path.py:function; for everybody: reward_library/
    engine       rollout/: a class with generate and load_weights (see rollout/__init__.py)
    backend      backends/: a class with the methods of backends/__init__.py
    tracker      trackers/: a class, its entry in trackers/__init__.py, its name in config.py
    data format  data_sources.py: load_rows
"""
