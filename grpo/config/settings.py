"""Every setting: its meaning, its default. command_line.py reads them, checks.py checks them.

`Config` is frozen; derived numbers are functions of it, never fields. The docstring under each field gives its meaning,
unit and allowed range: the text of `--help` and of the table in docs/configuration.md, which a test compares.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PROJECT = Path(__file__).resolve().parents[2]
DEMO = PROJECT / "configs" / "demo.yaml"


SCALING: dict[bool, Literal["group", "none"]] = {True: "group", False: "none"}  # what booleans of scale_rewards mean
TrackerName = Literal["tensorboard", "wandb", "swanlab", "trackio"]  # files of grpo/run/trackers/


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # --- what is trained, on what
    model: str | None = None
    """Causal language model: a hub name or a local folder."""
    model_revision: str | None = None
    """Branch, tag or commit of a model on the hub, tokenizer included; null: its main branch."""
    data: str | None = None
    """Questions: a .jsonl, .json, .csv or .parquet file, a folder of such or saved by datasets, or a hub name."""
    data_config: str | None = None
    """Configuration of a hub dataset or of a folder of files, such as main."""
    data_split: str = "train"
    """Split to train on; a plain file is all one split."""
    question_column: str = "question"
    """Column with the question: text, or a list of messages."""
    answer_column: str | None = "answer"
    """Column with the gold answer, shown to rewards as `answer`; a.b is key b of column a. null: the task has none."""
    answer_format: Literal["text", "hash", "letter", "number", "json"] = "text"
    """text: the cell. hash: after the last ####. letter: A to D. number: rows without are dropped. json: an object."""
    column_names: dict[str, str] = field(default_factory=dict)
    """New names for columns of data and eval_data: {Option A: option_a}; a file with the new name stays as it is."""
    id_column: str | None = None
    """Column whose cells must all be different, such as ID; null: not checked."""
    strip_cells: bool = False
    """Strip white space from both ends of the cells that go into prompt_template."""
    data_rows: int = 0
    """Use only the first so many questions, after the length filters; 0: all."""
    shuffle: bool = True
    """Each epoch has an order of its own, drawn from seed. false: the order of the data, also of texts in SFT."""
    eval_data: dict[str, str] | str | None = None
    """Held-out questions, evaluated before and after training; same forms as data. Several sets: {name: file, …}."""
    eval_split: str = "test"
    """Split of eval_data."""
    eval_rows: int = 0
    """Use only the first so many held-out questions, of each set; 0: all."""
    eval_generations: int = 0
    """Answers sampled to each held-out question, as in training: mean, pass@k, maj@k; 0: one greedy answer."""
    eval_steps: int = 0
    """Also evaluate every so many steps; 0: only before and after training."""
    eval_split_size: float = 0.0
    """Hold out a part of data in place of eval_data: a share below 1, or a number of rows; 0: nothing."""

    # --- how a question is put
    system_prompt: str | None = None
    """System message; without a chat template it comes before the question."""
    system_role: Literal["system", "user"] = "system"
    """user: put the system message before the first user turn, for chat templates without a system role (Gemma 2)."""
    prompt_template: str = "{question}"
    """Text of the user's turn; {name} stands for a column, {question} for the question."""
    chat_template: bool | None = None
    """Use the tokenizer's chat template; null: if it has one."""
    chat_template_file: str | None = None
    """A Jinja file that replaces the tokenizer's chat template; saved in every checkpoint."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}; kept in every checkpoint's prompt recipe."""
    example_question: str | None = None
    """One-shot example before the question: the user's turn, not put into prompt_template. Needs example_answer."""
    example_answer: str | None = None
    """One-shot example: the answer to example_question."""

    # --- rewards
    rewards: dict[str, float] = field(default_factory=dict)
    """Name to weight: a function of reward_func.py, or path.py:function; f@label and f@other are two uses of one."""
    reward_parameters: dict[str, dict] = field(default_factory=dict)
    """Name as in rewards, to the function's parameters, such as {refusal_reward: {refuse: 0.5}}."""
    reward_inputs: Literal["text", "messages"] = "text"
    """Completions reach rewards as strings, or as message lists as in TRL's conversational mode."""
    max_reward_failures: float = 0.2
    """The run stops when one function fails on a larger share of a step's completions, 0 to 1."""
    reward_workers: int = 2
    """Processes per rank that call reward functions; 0: the rank calls them, without time limit, for debugging."""
    reward_timeout_s: float = 10.0
    """Time limit of a reward function for one completion, in seconds, > 0; for a group of G, G times as long."""
    reward_memory_mb: int = 2048
    """Memory limit of a reward worker, MB beyond what it uses when idle; >= 64."""

    # --- batch: P = batch_size * gradient_accumulation_steps prompts a step, over all processes together
    batch_size: int = 1
    """Prompts, global, times gradient_accumulation_steps; >= 1."""
    gradient_accumulation_steps: int = 2
    """Multiplies batch_size: equal products train identically; >= 1."""
    num_generations: int = 4
    """G, completions of each prompt; >= 2."""
    epoch: int = 3
    """Passes over the data when max_steps is not given; >= 1."""
    max_steps: int | None = None
    """Steps of the run; null: from epoch."""
    num_minibatches: int = 1
    """Optimizer steps in one pass over a step's rows; 1 to P."""
    num_iterations: int = 1
    """Passes over a step's rows (mu); >= 1."""

    # --- lengths and sampling
    max_prompt_length: int = 256
    """Tokens; longer prompts are left out and counted."""
    prompt_length_quantile: float = 1.0
    """Also leave out prompts longer than this quantile of all prompts' lengths, in (0, 1]; 1: off."""
    max_answer_length: int | None = None
    """Tokens of the answer column's cell; questions with longer ones are left out and counted. null: no limit."""
    max_generate_length: int = 256
    """Most tokens of a completion."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion as soon as it contains one; they stay in it, and rewards see them."""
    temperature: float = 1.0
    """Sampling temperature, > 0; log-probs use it too."""
    top_p: float = 1.0
    """Nucleus sampling, in (0, 1]; 1: off."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: off."""
    min_p: float = 0.0
    """Drop tokens below min_p times the likeliest, in [0, 1); 0: off."""
    max_support: int = 128
    """Most tokens kept by top_p, top_k or min_p; part of the distribution, and stored for each sampled token."""

    # --- the algorithm
    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_pp", "gdpo"] | None = None
    """Fills settings below as a paper has them (docs/algorithms.md); those that you give win. null: none."""
    surrogate: str = "ppo_clip"
    """Loss of each token: ppo_clip, cispo, sapo, gmpo, reinforce, or your own path.py:function (docs/algorithms.md)."""
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    """Probability ratio of each token, or of the sequence (GSPO); sequence_token: the latter, gradients by token."""
    weighting: str = "grpo"
    """grpo: mean over rows of the row's token mean. dapo: global token mean. dr_grpo: sum over a constant length. Or
    your own path.py:function (docs/algorithms.md). Its old name is loss."""
    clip_eps: float = 0.2
    """PPO clip below: ratio >= 1 - clip_eps."""
    clip_eps_high: float | None = None
    """PPO clip above: ratio <= 1 + clip_eps_high; null: clip_eps. With cispo: the largest weight is 1 + this."""
    clip_ratio_max: float | None = None
    """With ppo_clip: largest ratio where the advantage is negative (dual clip; TRL's delta); null: none."""
    sapo_temperature: float = 1.0
    """With sapo: temperature of the gate where the advantage is positive, > 0."""
    sapo_temperature_negative: float = 1.05
    """With sapo: the same where it is negative, > 0."""
    beta: float = 0.0
    """Coefficient of the KL to the reference, the frozen starting model; 0: no reference is loaded."""
    kl_estimator: Literal["k3", "k2", "k3_weighted", "k1_reward"] = "k3"
    """Estimate of that KL (docs/algorithms.md). k3_weighted: k3 times the ratio. k1_reward: k1, in the rewards."""
    reference_sync_steps: int = 0
    """Renew the reference every so many steps (TR-DPO; docs/algorithms.md); 0: it stays the starting model."""
    reference_mixup: float = 1.0
    """The renewed reference is this times the policy plus (1 - this) times the old one, in (0, 1]."""
    router_aux_loss_coef: float = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts, over each row (docs/algorithms.md); 0: off."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus, the mean entropy of trained tokens in nats (docs/algorithms.md); 0: off."""
    entropy_target: float | None = None
    """Adapt entropy_coef, so that the bonus acts while the mean entropy is at most this, nats, > 0; null: constant."""
    entropy_coef_step: float = 0.005
    """With entropy_target: each update moves the coefficient by this, > 0."""
    entropy_coef_max: float = 1.0
    """With entropy_target: its largest value, > 0."""
    top_entropy_share: float = 1.0
    """Share of the trained tokens, those of highest entropy, that the surrogate acts on, in (0, 1]; 1: all."""
    baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What advantages are measured from: the mean reward of the group, of its others (RLOO), or of all rows."""
    scale_rewards: Literal["group", "batch", "none"] | bool = "group"
    """Divide advantages by the rewards' standard deviation? In the group (true), over all rows, or not (false); dr_grpo
    implies none."""
    normalize_each_reward: bool = False
    """Centre and scale each reward in its group before the weighted sum (GDPO)."""
    advantage: str | None = None
    """Your own path.py:function in place of baseline, scale_rewards and normalize_each_reward; null: those."""
    advantage_clip: float = 10.0
    """Largest absolute advantage, where it is divided by a standard deviation; others are not clipped."""
    truncated: Literal["train", "mask"] = "train"
    """mask: completions cut at max_generate_length carry no loss; their rewards still count in their group."""
    filter_groups: Literal["keep", "drop", "resample"] = "keep"
    """Groups that group_filter refuses: keep them in the denominators, drop them, or draw others in their place until
    a step has its P groups (DAPO's dynamic sampling)."""
    group_filter: str = "zero_variance"
    """Which groups drop and resample leave out: those whose rewards are all equal, or by your own path.py:function."""
    max_rounds: int = 10
    """With resample: most rounds of drawing in a step, >= 2; then it trains on the groups that there are."""
    difficulty_range: list[float] | None = None
    """[low, high]: a question rests while its running mean of the first reward's score is not between; null: none."""
    difficulty_rest: int = 1
    """With difficulty_range: epochs that such a question rests, >= 1."""
    logit_clamp: float = 100.0
    """Logits are centred on their mid-range and clamped to this size, in sampling and in scoring."""
    sampler_correction: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"] = (
        "token_truncate"
    )
    """Importance weight that corrects a sampler whose log-probs differ from the trainer's: of a token or a sequence,
    cut at max_importance_weight, or 0 outside 1 / max_importance_weight to it (docs/algorithms.md)."""
    max_importance_weight: float = 2.0
    """Limit of the importance weight; > 0, with a mask > 1."""
    off_policy_threshold: float | None = None
    """Rows of negative advantage have no surrogate if mean(sampler - policy log-prob) is above this; null: off."""

    # --- optimizer (AdamW)
    lr: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_min_lr", "constant_with_warmup"] = "constant"
    """Rate of update k = 0 to m-1 of the m that follow warmup, with p = k / m. constant: lr. linear: lr (1 - p).
    cosine: lr (1 + cos(pi p)) / 2. The last one is above 0 (linear: lr / m); 0 would be one update later.
    cosine_with_min_lr: cosine from lr to min_lr_ratio lr. constant_with_warmup: constant, and a warmup must be set."""
    min_lr_ratio: float = 0.0
    """With cosine_with_min_lr: the rate at the end, as a share of lr, in (0, 1)."""
    warmup_ratio: float = 0.0
    """In [0, 1). Of the run's n optimizer steps the first w = ceil(warmup_ratio n) rise: lr (j + 1) / w, j from 0."""
    warmup_steps: int = 0
    """The number w of warmup itself, in place of warmup_ratio; >= 0. Set one of them."""
    weight_decay: float = 0.0
    """AdamW's weight decay, of matrices only."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; > 0."""
    max_bad_steps: int = 5
    """Updates skipped in a row (NaN or Inf) before the run stops with code 76."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """8-bit moments take a quarter of the memory; paged ones may also move to CPU memory (CUDA). Need bitsandbytes."""

    # --- LoRA: small matrices trained beside a frozen model
    lora_r: int = 0
    """Rank of the adapter; 0: the whole model is trained."""
    lora_alpha: float | None = None
    """The adapter is scaled by lora_alpha / lora_r; null: by 2."""
    lora_dropout: float = 0.0
    """Dropout on an adapter's inputs in SFT, in [0, 1); must be 0 in GRPO, which scores what it samples."""
    lora_target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter: all linear ones but the head, or a list of names such as [q_proj, v_proj]."""
    load_in_4bit: bool = False
    """Hold the frozen model's linear layers in 4 bits (QLoRA). Needs lora_r and bitsandbytes; not with deepspeed."""

    # --- processes
    backend: Literal["single", "ddp", "deepspeed"] = "ddp"
    """ddp: whole weights on every process, one or more. single: ddp for one process only. deepspeed: ZeRO shards."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """With deepspeed: 1 shards optimizer state, 2 also gradients, 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """With deepspeed: keep optimizer state, or also weights (stage 3), in CPU memory."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON of your own; auto is filled in, contradictions to these settings are refused."""

    # --- machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward passes; weights and optimizer state are fp32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in CPU memory until the backward needs them; CUDA only."""
    reference_offload: bool = False
    """Keep the reference (beta > 0, no LoRA) in CPU memory except while it scores; CUDA only."""
    micro_batch_tokens: int = 4096
    """Most tokens of one backward, a prompt counted once: memory and speed only. Fewer, to keep all ranks busy."""
    rollout_chunk_rows: int = 64
    """Most completions that a process samples at once: memory and speed only. Fewer, to keep all ranks busy."""
    rollout_engine: Literal["native", "vllm"] = "native"
    """What samples completions: native, in the training process; vllm: a vLLM server (docs/vllm.md)."""
    rollout_server: str | list[str] | None = None
    """With vllm: address of a running server, http://host:port, or several; null: training starts its own."""
    rollout_transfer: Literal["http", "broadcast"] = "http"
    """With vllm, how weights travel: http, a stream; broadcast: shared memory, NCCL or gloo (docs/vllm.md)."""
    rollout_timeout_s: float = 300.0
    """With vllm: seconds without a new token or an answer after which the run ends; >= 1, < stall_timeout_s."""
    max_sampler_gap: float | None = None
    """With vllm: largest mean |sampler - trainer| log-prob; above, the run ends. null: 0.02, bf16 on a side 0.1."""
    rollout_ahead: Literal[0, 1] = 0
    """With vllm, 1: it samples the next step's completions while this step is trained, by weights a step older."""
    vllm_args: list[str] = field(default_factory=list)
    """Flags of vLLM for the server that training starts, such as [--gpu-memory-utilization, "0.4"]."""
    rollout_tokens: int | None = None
    """Most tokens in the KV cache of a process, counting prompts and the longest possible completions; null: those of
    rollout_chunk_rows. Rows wait until others end, so a large chunk keeps the batch full in little memory."""
    cuda_graphs: bool = True
    """Launch a decode step as one CUDA graph: faster, a little more memory. CUDA only; with a notice where it fails."""
    logits_chunk_mb: int = 256
    """Memory of the widest logits block in the loss, MB per process."""
    num_threads: int | None = None
    """CPU threads of each process; null: OMP_NUM_THREADS with one process, else the cores divided by the processes."""
    deterministic: bool = False
    """Bit-identical weights for any number of processes on CPU (ddp): one thread, sums in fixed point; slower."""
    seed: int = 42
    """Determines data order and every sampled token; >= 0."""

    # --- what may happen to a run
    check_weights_steps: int = 1
    """Check weights and optimizer state for flipped bits before the update of every so many steps; 0: never."""
    stall_timeout_s: float = 600.0
    """Seconds without progress on any rank before the run ends with code 74, naming the rank; >= 1."""
    preempt_grace_s: float = 25.0
    """Seconds that SIGTERM leaves for saving. torchrun kills after 30."""

    # --- the stage before
    sft: dict[str, Any] = field(default_factory=dict)
    """Settings of `python -m grpo.sft`, which override these; train.py checks them and does not use them."""

    # --- what is written
    output_dir: str = "./output"
    """Checkpoints: output_dir/checkpoint_N."""
    save_steps: int = 100
    """Checkpoint every so many steps; the last step always saves. 0: only the last."""
    save_total_limit: int | None = None
    """Checkpoints kept, the newest; null: all."""
    save_in_background: bool = True
    """Write checkpoints while training goes on; costs a copy of weights and optimizer state in CPU memory."""
    push_to_hub: str | None = None
    """Hub repository user/name that gets each checkpoint's model and card, in the background; new ones are private."""
    push_timeout_s: float = 600.0
    """Seconds that one push may take, and that the run's end waits for the last one; > 0."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the newest valid checkpoint, if any. must: require one. never: move existing ones aside."""
    runs_dir: str = "./runs"
    """TensorBoard events, metrics.jsonl, train.log: runs_dir/run_name."""
    run_name: str | None = None
    """Folder of the run; null: the config file's name."""
    report_to: TrackerName | Literal["none"] | list[TrackerName] = "tensorboard"
    """Where metrics go, beside the console, train.log and metrics.jsonl: one, or a list of several."""
    tracker_project: str = "grpo"
    """Project in wandb, swanlab and trackio."""
    tracker_mode: Literal["online", "offline"] = "online"
    """offline: wandb, swanlab and trackio only write to runs_dir/run_name, to be synced later."""
    log_samples_steps: int = 10
    """Write completions with rewards and advantages every so many steps: JSON lines, a few as text; 0: never."""
    log_tokens_steps: int = 10
    """Write log-prob, ratio, mask and text of each token of 16 rows of a step, every so many steps; 0: never."""
    log_tokens_mb: float = 64.0
    """MB (10^6 bytes) that these figures may have in a run; the oldest are thinned out first; > 0."""
    log_completions_steps: int = 0
    """Print a few completions as a table on the console every so many steps; 0: never."""
    console_language: Literal["en", "zh", "zh-Hant"] = "en"
    """Language of console texts about completions, in training, evaluation and inference (grpo/run/languages.py)."""
    quiet: bool = False
    """Print warnings, errors and the last line only; train.log has everything. false: a live view on a terminal."""
    inference_questions: list[str] = field(default_factory=list)
    """Built-in cases of inference.py, kept in the checkpoint; empty: the first held-out (or training) questions."""

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            object.__setattr__(self, "scale_rewards", SCALING[self.scale_rewards])


def prompts_per_step(cfg: Config) -> int:
    """P, prompts per step over all processes."""
    return cfg.batch_size * cfg.gradient_accumulation_steps


def total_steps(cfg: Config, num_rows: int) -> int:
    """Steps of the whole run over `num_rows` usable questions."""
    if cfg.max_steps is not None:
        return cfg.max_steps
    return math.ceil(cfg.epoch * num_rows / prompts_per_step(cfg))


def updates_per_step(cfg: Config) -> int:
    """Optimizer steps per step."""
    return cfg.num_minibatches * cfg.num_iterations


def kl_in_loss(cfg: Config) -> bool:
    """Whether the loss has a KL term; with kl_estimator k1_reward it is in the rewards."""
    return cfg.beta > 0 and cfg.kl_estimator != "k1_reward"


def scales_advantages(cfg: Config) -> bool:
    """Whether advantages are divided by a standard deviation, that of their group or of all rows."""
    return cfg.scale_rewards != "none" and cfg.weighting != "dr_grpo"


def is_deepspeed(cfg: Config) -> bool:
    """Whether DeepSpeed's ZeRO holds the optimizer."""
    return cfg.backend == "deepspeed"


def shards_weights(cfg: Config) -> bool:
    """Whether no rank holds whole weights between steps (ZeRO stage 3)."""
    return is_deepspeed(cfg) and cfg.zero_stage == 3
