"""Checks of the settings that need no data and no model: ranges, and what contradicts what."""

import math

from grpo.config import Config, prompts_per_step
from grpo.errors import UserError


def check(cfg: Config) -> None:
    """Cross-field checks, before anything loads. Raises UserError naming the setting."""
    if cfg.model is None:
        raise UserError("model: none given. Say which: --model <folder or hub name> (nothing at all runs the demo).")
    if cfg.data is None:
        raise UserError("data: none given. Say which: --data <file, folder or hub name>.")
    if not cfg.rewards:
        raise UserError("rewards: none given. Say which, with weights: --rewards '{\"correctness_reward\": 1.0}'.")
    if not any(cfg.rewards.values()):
        raise UserError(f"rewards: every weight is 0, got {cfg.rewards}. Nothing would be learned: weigh at least one.")
    if not all(math.isfinite(weight) for weight in cfg.rewards.values()):
        raise UserError(f"rewards: weights must be finite numbers, got {cfg.rewards}.")
    if cfg.num_generations < 2:
        raise UserError(
            f"num_generations: must be >= 2, got {cfg.num_generations}: a group of one has no baseline. Try 8."
        )
    for name in ("batch_size", "gradient_accumulation_steps", "epoch", "num_minibatches", "num_iterations",
                 "max_prompt_length", "max_generate_length", "max_support", "max_bad_steps", "micro_batch_tokens",
                 "rollout_chunk_rows", "logits_chunk_mb"):  # fmt: skip
        _require(cfg, name, getattr(cfg, name) >= 1, ">= 1")
    for name in ("save_steps", "eval_steps", "eval_rows", "log_samples_steps", "top_k", "seed"):
        _require(cfg, name, getattr(cfg, name) >= 0, ">= 0")
    for name in ("max_steps",):
        _require(cfg, name, cfg.max_steps is None or cfg.max_steps >= 0, ">= 0, or null")
    for name in ("save_total_limit", "num_threads"):
        _require(cfg, name, getattr(cfg, name) is None or getattr(cfg, name) >= 1, ">= 1, or null")
    for name in ("lr", "temperature", "max_grad_norm", "logit_clamp", "advantage_clip", "max_importance_weight"):
        value = getattr(cfg, name)
        _require(cfg, name, math.isfinite(value) and value > 0, "a finite number > 0")
    for name in ("beta", "weight_decay", "clip_eps"):
        value = getattr(cfg, name)
        _require(cfg, name, math.isfinite(value) and value >= 0, "a finite number >= 0")
    _require(cfg, "clip_eps_high", cfg.clip_eps_high is None or 0 <= cfg.clip_eps_high < math.inf, ">= 0, or null")
    _require(cfg, "top_p", 0 < cfg.top_p <= 1, "in (0, 1]")
    for name in ("min_p", "warmup_ratio", "adam_beta1", "adam_beta2"):
        _require(cfg, name, 0 <= getattr(cfg, name) < 1, "in [0, 1)")
    _require(cfg, "max_reward_failures", 0 <= cfg.max_reward_failures <= 1, "in [0, 1]")
    if cfg.top_k > cfg.max_support:
        raise UserError(f"top_k: must be at most max_support {cfg.max_support}, got {cfg.top_k}. Raise --max_support.")
    if cfg.deterministic and (cfg.backend == "deepspeed" or (cfg.num_threads or 1) != 1):
        raise UserError("deterministic: it needs --backend ddp or single, and num_threads 1 or null.")
    if cfg.backend != "deepspeed" and (cfg.offload != "none" or cfg.deepspeed_config is not None):
        raise UserError("offload, deepspeed_config: they need --backend deepspeed, got ddp.")
    if cfg.offload != "none" and cfg.zero_stage < (3 if cfg.offload == "all" else 1):
        raise UserError(
            f"offload: {cfg.offload} needs zero_stage >= {3 if cfg.offload == 'all' else 1}, got {cfg.zero_stage}."
        )
    if cfg.num_minibatches > prompts_per_step(cfg):
        raise UserError(
            f"num_minibatches: at most one per prompt of a step, {prompts_per_step(cfg)}, got {cfg.num_minibatches}. "
            "Raise batch_size or gradient_accumulation_steps."
        )


def _require(cfg: Config, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name}: must be {allowed}, got {getattr(cfg, name)}.")
