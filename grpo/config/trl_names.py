"""Options of TRL 1.16, open-r1 and transformers' TrainingArguments, beside the settings here.

One table for three uses: hints for unknown settings, `python -m grpo.config --from_trl`, and docs/from_trl.md.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Options that share a line."""

    names: str  # theirs, separated by blanks
    here: str = ""  # settings here, separated by blanks; empty: there is none
    note: str = ""  # what differs, or what to do instead
    idle: bool = False  # leaving it out changes nothing that is learned


TABLE: dict[str, tuple[Row, ...]] = {
    "Model and data": (
        Row("model_name_or_path", "model"),
        Row("model_revision", "model_revision"),
        Row("dtype torch_dtype", "dtype", "Theirs is that of the weights, always fp32 here; ours is as their bf16."),
        Row("bf16", "dtype", "true, TRL's default: dtype bf16. false: fp32."),
        Row("fp16 bf16_full_eval fp16_full_eval", "dtype", "There is no fp16; dtype bf16 is nearest."),
        Row("attn_implementation", "", "The trainer chooses the attention kernel.", True),
        Row("trust_remote_code", "", "Code that comes with a model is never run."),
        Row("model_init_kwargs", "", "Say model, model_revision and dtype."),
        Row("dataset_name", "data"),
        Row("dataset_config dataset_configs", "data_config"),
        Row("dataset_train_split", "data_split"),
        Row("dataset_test_split", "eval_split"),
        Row("dataset_prompt_column", "question_column", "TRL reads the column prompt, here it is question."),
        Row("test_split_size", "eval_split_size"),
        Row("datasets dataset_mixture", "data", "One source; write a mixture into one file."),
        Row("dataset_streaming streaming ignore_bias_buffers", "", "Data are read as a whole.", True),
        Row("remove_unused_columns label_names length_column_name", "", "Rewards get all columns.", True),
        Row("shuffle_dataset", "shuffle"),
        Row("train_sampling_strategy group_by_length", "", "Questions come in random order; shuffle false "
            "keeps that of the data."),
        Row("data_seed", "seed", "One seed determines the order of the data and every sampled token."),
        Row("seed", "seed", "The same number gives other samples than in TRL."),
        Row("max_prompt_length", "max_prompt_length", "TRL takes prompts of any length (older versions cut them); here "
            "longer ones are left out and counted."),
        Row("system_prompt", "system_prompt"),
        Row("chat_template", "chat_template_file", "The text of a template goes into a file; chat_template is true, "
            "false or null here."),
        Row("chat_template_kwargs", "chat_template_kwargs"),
    ),
    "Rewards": (
        Row("reward_funcs reward_weights", "rewards", "One mapping, {name: weight}; docs/from_trl.md lists the names."),
        Row("reward_model_name_or_path", "rewards", "model_reward, with reward_parameters "
            "{model_reward: {folder: FOLDER}}."),
        Row("cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct "
            "cosine_max_len repetition_n_grams repetition_max_penalty max_completion_len soft_punish_cache",
            "reward_parameters", "Under the name of the reward, {name: {parameter: value}}."),
        Row("code_language code_eval_test_batch_size parallel_code_exec_per_proc e2b_router_url morph_router_url "
            "code_provider ioi_provider", "", "Code runs on this machine, in the reward workers.", True),
    ),
    "Batch and length of the run": (
        Row("per_device_train_batch_size generation_batch_size", "batch_size", "Prompts of a step on all processes "
            "together: per_device_train_batch_size x processes x steps_per_generation / num_generations."),
        Row("gradient_accumulation_steps", "gradient_accumulation_steps", "It multiplies batch_size and does nothing "
            "else; --from_trl writes 1."),
        Row("steps_per_generation", "num_minibatches", "steps_per_generation / gradient_accumulation_steps."),
        Row("num_generations", "num_generations", "8 in TRL, 4 here."),
        Row("num_iterations", "num_iterations"),
        Row("num_train_epochs", "epoch", "A whole number. TRL leaves out the questions that do not fill a step at the "
            "end of an epoch; here the next epoch continues there."),
        Row("max_steps", "max_steps", "TRL counts updates of the weights, here each sampling is a step: divide by "
            "num_minibatches x num_iterations. -1 is null."),
        Row("num_processes num_machines", "", "Say torchrun --nproc_per_node N; batch_size does not depend on "
            "it.", True),
        Row("auto_find_batch_size", "", "After out-of-memory errors micro-batches shrink by themselves.", True),
        Row("average_tokens_across_devices", "", "Always.", True),
    ),
    "Sampling": (
        Row("max_completion_length", "max_generate_length", "512 in TRL, 256 here."),
        Row("temperature", "temperature"),
        Row("top_p", "top_p", "At most max_support tokens are kept; log-probs are those of what is kept."),
        Row("top_k", "top_k", "0 is off; -1 is refused."),
        Row("min_p", "min_p", "null in TRL is 0 here."),
        Row("generation_kwargs", "stop", "temperature, top_p, top_k, min_p and stop are settings; others have none."),
        Row("repetition_penalty", "", "Tokens are drawn from the distribution that is trained; try repetition_reward."),
        Row("use_vllm", "rollout_engine", "Write vllm: docs/vllm.md.", True),
        Row("vllm_mode vllm_server_base_url vllm_server_host vllm_server_port", "rollout_server",
            "An address; null is colocate. The server is launch/vllm_server.sh.", True),
        Row("vllm_server_timeout", "rollout_timeout_s", "", True),
        Row("vllm_gpu_memory_utilization vllm_enable_sleep_mode vllm_dtype vllm_enable_prefix_caching", "vllm_args",
            "Flags of vLLM; those of a running server go to launch/vllm_server.sh.", True),
        Row("vllm_group_port", "rollout_transfer", "TRL broadcasts over NCCL at this port; write broadcast.", True),
        Row("vllm_model_impl vllm_max_model_length vllm_max_model_len vllm_tensor_parallel_size "
            "vllm_device", "", "A server takes vLLM's own flags (docs/vllm.md).", True),
        Row("vllm_structured_outputs_regex vllm_guided_decoding_regex", "", "Score the form with a reward."),
        Row("vllm_importance_sampling_correction vllm_importance_sampling_mode", "sampler_correction",
            "Acts only where the sampler's log-probs are not the trainer's; the modes have the same names.", True),
        Row("vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap",
            "max_importance_weight", "Acts only where the sampler's log-probs are not the trainer's.", True),
        Row("cache_implementation use_cache pad_to_multiple_of ds3_gather_for_generation "
            "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
            "", "The engine has a cache of its own; rollout_tokens bounds it.", True),
        Row("max_tool_calling_iterations", "", "There are no tools."),
    ),
    "Algorithm": (
        Row("loss_type", "weighting surrogate", "dapo in TRL, grpo here. bnpo: dapo is near. cispo: surrogate cispo, "
            "weighting dapo. sapo: surrogate sapo. luspo and vespo: write surrogate: path.py:function."),
        Row("epsilon", "clip_eps"),
        Row("epsilon_high", "clip_eps_high", "With cispo theirs is the bound itself, ours 1 + clip_eps_high."),
        Row("delta", "clip_ratio_max"),
        Row("beta", "beta"),
        Row("use_bias_correction_kl", "kl_estimator", "true, TRL's default: k3_weighted, k3 times the ratio. "
            "Matters where beta is above 0."),
        Row("scale_rewards", "scale_rewards", "dr_grpo implies none."),
        Row("multi_objective_aggregation", "normalize_each_reward", "normalize_then_sum: true, with baseline batch and "
            "scale_rewards batch."),
        Row("importance_sampling_level", "ratio"),
        Row("mask_truncated_completions", "truncated", "true: mask."),
        Row("sync_ref_model ref_model_sync_steps", "reference_sync_steps", "Every 512 updates in TRL, with "
            "sync_ref_model true; counted as max_steps. 0 here."),
        Row("ref_model_mixup_alpha", "reference_mixup", "0.6 in TRL, 1 here: the policy replaces the reference."),
        Row("ref_model_init_kwargs", "", "The reference is loaded as the model is."),
        Row("sapo_temperature_pos", "sapo_temperature"),
        Row("sapo_temperature_neg", "sapo_temperature_negative"),
        Row("vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg", "surrogate",
            "Parameters of a loss that is not here.", True),
        Row("off_policy_mask_threshold", "off_policy_threshold", "TRL takes the old log-probs where the engine gives "
            "none, ours are always the sampler's."),
        Row("top_entropy_quantile", "top_entropy_share", "TRL's quantile is over a micro-batch, here over a minibatch, "
            "before the step's first update."),
        Row("entropy_coef", "entropy_coef", "TRL's mean is over a micro-batch, here over a minibatch."),
        Row("use_adaptive_entropy entropy_target", "entropy_target", "true: entropy_target, 0.2 in TRL. false: null."),
        Row("entropy_coef_delta", "entropy_coef_step"),
        Row("entropy_coef_max", "entropy_coef_max"),
        Row("entropy_coef_min", "", "The coefficient may fall to 0."),
        Row("router_aux_loss_coef", "router_aux_loss_coef", "null in TRL: the value of the model's config.json; 0 "
            "here."),
        Row("disable_dropout", "", "Dropout is always off.", True),
        Row("cast_lm_head_to_fp32", "", "Log-probs are taken of fp32 logits.", True),
    ),
    "Optimizer": (
        Row("learning_rate", "lr"),
        Row("lr_scheduler_type", "lr_schedule", "linear in TRL, constant here."),
        Row("lr_scheduler_kwargs", "min_lr_ratio", "min_lr_rate; others have no setting."),
        Row("warmup_ratio", "warmup_ratio", "The first update has a rate of 0 in TRL, above 0 here."),
        Row("warmup_steps", "warmup_steps", "Updates of the weights. Below 1 it is a share: warmup_ratio."),
        Row("weight_decay", "weight_decay"),
        Row("adam_beta1", "adam_beta1"),
        Row("adam_beta2", "adam_beta2"),
        Row("adam_epsilon", "", "It is 1e-8."),
        Row("max_grad_norm", "max_grad_norm", "0, no clipping, is a large number here."),
        Row("optim", "optimizer", "adamw, adamw_8bit or paged_adamw_8bit."),
        Row("optim_args optim_target_modules label_smoothing_factor neftune_noise_alpha", "", "AdamW on the plain "
            "loss."),
    ),
    "LoRA": (
        Row("use_peft", "lora_r", "An adapter is trained where lora_r is above 0; TRL's default is then 16."),
        Row("lora_r", "lora_r"),
        Row("lora_alpha", "lora_alpha"),
        Row("lora_dropout", "lora_dropout", "0.05 in TRL; must be 0 in GRPO, which scores what it samples."),
        Row("lora_target_modules", "lora_target_modules", "null in TRL: PEFT's choice, mostly [q_proj, v_proj]."),
        Row("use_rslora", "lora_alpha", "The same as lora_alpha times the square root of lora_r."),
        Row("lora_task_type", "", "CAUSAL_LM.", True),
        Row("lora_target_parameters lora_modules_to_save use_dora", "", "Plain LoRA on linear layers."),
        Row("load_in_4bit", "load_in_4bit"),
        Row("load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", "load_in_4bit",
            "nf4, its constants quantized too."),
    ),
    "Machine": (
        Row("gradient_checkpointing activation_checkpointing", "gradient_checkpointing",
            "true in TRL, false here: memory and speed only."),
        Row("activation_checkpointing_kwargs gradient_checkpointing_kwargs",
            "gradient_checkpointing", "It has no options.", True),
        Row("deepspeed", "deepspeed_config", "With backend: deepspeed. zero_stage and offload do without a file."),
        Row("fsdp fsdp_config", "zero_stage", "With backend: deepspeed; zero_stage 3 shards the weights."),
        Row("use_cpu no_cuda", "device", "device: cpu."),
        Row("full_determinism", "deterministic"),
        Row("ddp_timeout", "stall_timeout_s", "", True),
        Row("torch_compile torch_compile_backend torch_compile_mode tf32 use_liger_kernel liger_kernel_config "
            "torch_empty_cache_steps accelerator_config parallelism_config ddp_backend ddp_bucket_cap_mb "
            "ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph local_rank use_liger_loss "
            "use_mps_device jit_mode_eval use_ipex fp16_opt_level fp16_backend half_precision_backend "
            "accelerate_config env", "", "The trainer's own choice. Leave it out.", True),
        Row("dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
            "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order", "",
            "Prompts are tokenized at the start. Leave it out.", True),
    ),
    "Evaluation": (
        Row("eval_strategy evaluation_strategy do_eval", "eval_data eval_steps", "Evaluation happens where eval_data "
            "(or eval_split_size) is set."),
        Row("eval_steps", "eval_steps", "Counted as max_steps; before and after training it is always evaluated."),
        Row("num_generations_eval", "eval_generations", "TRL samples as in training; here one greedy answer is the "
            "default."),
        Row("eval_on_start eval_delay per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches "
            "eval_use_gather_object prediction_loss_only include_for_metrics batch_eval_metrics", "",
            "Leave it out.", True),
        Row("load_best_model_at_end metric_for_best_model greater_is_better", "", "best.json names the best "
            "checkpoint.", True),
        Row("benchmarks callbacks", "", "Run python -m grpo.evaluate on a checkpoint.", True),
    ),
    "What is written": (
        Row("output_dir", "output_dir", "Where it has checkpoints, the run continues (resume: auto)."),
        Row("overwrite_output_dir", "resume", "resume: never moves existing checkpoints aside.", True),
        Row("resume_from_checkpoint", "resume", "auto or must; a folder's newest valid checkpoint is taken."),
        Row("save_strategy", "save_steps", "save_steps 0 saves the last step only."),
        Row("save_steps", "save_steps", "A whole number, counted as max_steps: 500 in TRL, 100 here."),
        Row("save_total_limit", "save_total_limit"),
        Row("save_only_model save_safetensors save_on_each_node enable_jit_checkpoint ignore_data_skip "
            "restore_callback_states_from_checkpoint", "", "Checkpoints hold all that resuming needs.", True),
        Row("report_to", "report_to", "none in TRL, tensorboard here; all is refused."),
        Row("run_name", "run_name"),
        Row("project wandb_project trackio_project", "tracker_project"),
        Row("wandb_entity wandb_run_group wandb_log_unique_prompts trackio_space_id trackio_bucket_id "
            "trackio_static_space_id", "", "Say it in the tracker's own environment variables.", True),
        Row("log_completions", "log_completions_steps", "true: every so many steps."),
        Row("logging_strategy logging_steps logging_first_step logging_nan_inf_filter logging_dir log_level "
            "log_level_replica log_on_each_node disable_tqdm include_num_input_tokens_seen num_completions_to_print "
            "log_unique_prompts log_multimodal skip_memory_metrics debug do_train do_predict", "",
            "Every step is logged.", True),
        Row("push_to_hub hub_model_id", "push_to_hub", "user/name."),
        Row("hub_token push_to_hub_token hub_private_repo hub_strategy hub_always_push hub_revision hub_model_revision "
            "push_to_hub_revision overwrite_hub_revision log_completions_hub_repo", "",
            "It pushes at each save, with the token of HF_TOKEN or hf auth login.", True),
    ),
    "SFT, in python -m grpo.sft and the sft section": (
        Row("max_length max_seq_length", "max_generate_length", "Of the solution alone; max_prompt_length bounds the "
            "prompt."),
        Row("dataset_text_field", "solution_column", "The question and its solution stand in two columns."),
        Row("completion_only_loss assistant_only_loss", "loss_on", "completion, or all."),
        Row("packing packing_strategy padding_free eval_packing", "packing"),
        Row("activation_offloading", "activation_offload"),
        Row("chat_template_path", "chat_template_file"),
        Row("truncation_mode", "", "Long texts are left out and counted, never cut."),
        Row("dataset_kwargs dataset_num_proc eos_token pad_token", "", "Leave it out.", True),
    ),
}  # fmt: skip
ROWS: dict[str, Row] = {name: row for rows in TABLE.values() for row in rows for name in row.names.split()}

VALUES = {  # setting here -> their value -> the same here
    "dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "optimizer": {
        **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"], "adamw"),
        **dict.fromkeys(["adamw_bnb_8bit", "adamw_8bit"], "adamw_8bit"),
        "paged_adamw_8bit": "paged_adamw_8bit",
    },
    "scale_rewards": {"true": "group", "false": "none"},
}


def value_hint(setting: str, value: str) -> str:
    """What to write for a value of TRL's; empty: it is none.

    >>> value_hint("optimizer", "adamw_torch"), value_hint("optimizer", "sgd")
    ('Write adamw', '')
    """
    if setting == "chat_template" and "{" in value:
        return "The text of a template goes into a file: chat_template_file"
    same = VALUES.get(setting, {}).get(value.lower())
    return f"Write {same}" if same else ""


def hint(name: str, settings: Collection[str]) -> str | None:
    """What to write for an option of TRL, as the end of a line; None: it is none of theirs, or has no such setting.

    >>> hint("learning-rate", ["lr"]), hint("learning_rate", ["seed"]), hint("lrr", ["lr"])
    ("TRL's name, here it is lr", None, None)
    >>> hint("attn_implementation", ["lr"])
    "TRL's, there is none here. The trainer chooses the attention kernel"
    """
    row = ROWS.get(name.replace("-", "_"))
    here = row.here.split() if row else []
    if row is None or name in here or not set(here) <= set(settings):
        return None
    note = f". {row.note.rstrip('.')}" if row.note else ""
    return (f"TRL's name, here it is {' and '.join(here)}" if here else "TRL's, there is none here") + note


def markdown_table() -> str:
    """The table of docs/from_trl.md. Written by `python -m grpo.config --trl_names`."""
    lines = []
    for title, rows in TABLE.items():
        lines += [f"### {title}", "", "| TRL | here | note |", "| --- | --- | --- |"]
        lines += [f"| {_code(row.names)} | {_code(row.here) or '-'} | {row.note} |" for row in rows] + [""]
    return "\n".join(lines[:-1])


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())
