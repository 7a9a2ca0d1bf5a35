"""Settings of the algorithm: presets, what each setting needs, and combinations that make no sense."""

import math
from typing import Any

from grpo.config.settings import Config
from grpo.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {  # what the setting `algorithm` sets; docs/algorithms.md has the papers
    "grpo": {},
    "dr_grpo": {"weighting": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"weighting": "dapo", "clip_eps_high": 0.28, "filter_groups": "resample"},
    "gspo": {"ratio": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4},
    "cispo": {"surrogate": "cispo", "weighting": "dapo", "clip_eps_high": 4.0},
    "sapo": {"surrogate": "sapo"},
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none", "weighting": "dr_grpo"},
    "reinforce_pp": {"baseline": "batch", "scale_rewards": "batch", "weighting": "dapo"},
    "gdpo": {"normalize_each_reward": True, "baseline": "batch", "scale_rewards": "batch"},
}
TABLE = ("ppo_clip", "cispo", "sapo", "gmpo", "reinforce")  # surrogates by name; others are the user's own
NAMED = {  # settings that take one of these names, or a function of the user's own as path.py:function
    "surrogate": TABLE,
    "weighting": ("grpo", "dapo", "dr_grpo"),
    "advantage": (),
    "group_filter": ("zero_variance",),
}
REPLACED = ("baseline", "scale_rewards", "normalize_each_reward", "advantage_clip")  # by the setting advantage
USED_BY = {  # settings of the surrogates that read them
    "clip_eps": ("ppo_clip", "cispo", "gmpo"),
    "clip_eps_high": ("ppo_clip", "cispo", "gmpo"),
    "clip_ratio_max": ("ppo_clip",),
    "sapo_temperature": ("sapo",),
    "sapo_temperature_negative": ("sapo",),
    "ratio": ("ppo_clip", "cispo", "sapo"),
}


def preset_notice(cfg: Config) -> str | None:
    """What the preset of a run has set, and what was given otherwise; None: there is no preset.

    >>> preset_notice(Config(algorithm="gspo", ratio="sequence", clip_eps=3e-4, clip_eps_high=0.1))
    'algorithm gspo: ratio sequence, clip_eps 0.0003. Given otherwise: clip_eps_high 0.1.'
    """
    if cfg.algorithm is None:
        return None
    preset = PRESETS[cfg.algorithm]
    same = [f"{name} {value}" for name, value in preset.items() if getattr(cfg, name) == value]
    others = [f"{name} {getattr(cfg, name)}" for name, value in preset.items() if getattr(cfg, name) != value]
    said = f"algorithm {cfg.algorithm}: {', '.join(same) or 'the defaults'}."
    return said + (f" Given otherwise: {', '.join(others)}." if others else "")


def check_algorithm(cfg: Config) -> None:
    """Raises UserError for a setting without effect, or beyond what it can be."""
    default = Config()
    for name in NAMED:
        if getattr(cfg, name) is not None:
            check_function(name, getattr(cfg, name))
    for name, users in USED_BY.items():
        value = getattr(cfg, name)
        own_clip = cfg.surrogate not in TABLE and name.startswith("clip_eps")  # may be read by the function's author
        if value != getattr(default, name) and cfg.surrogate not in users and not own_clip:
            raise UserError(
                f"{name}: it acts with surrogate {' or '.join(users)}, got {value} with {cfg.surrogate[:60]}. "
                "Leave it out."
            )
    for name in ("sapo_temperature", "sapo_temperature_negative"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"{name}: must be a finite number > 0, got {getattr(cfg, name)}.")
    high = 1 + (cfg.clip_eps if cfg.clip_eps_high is None else cfg.clip_eps_high)
    if cfg.clip_ratio_max is not None and not high < cfg.clip_ratio_max < math.inf:
        raise UserError(
            f"clip_ratio_max: must be above 1 + clip_eps_high, {high:g}, or null, got {cfg.clip_ratio_max:g}."
        )
    _check_kl(cfg)
    if cfg.sampler_correction.endswith("mask") and cfg.max_importance_weight <= 1:
        raise UserError(
            f"max_importance_weight: must be above 1 with sampler_correction {cfg.sampler_correction}, got "
            f"{cfg.max_importance_weight:g}: weights outside 1 / it to it are 0."
        )
    _check_entropy(cfg)
    _check_choice_of_rows(cfg)
    for name in REPLACED if cfg.advantage is not None else ():
        if getattr(cfg, name) != getattr(default, name):
            raise UserError(
                f"{name}: the function of advantage takes its place, got {getattr(cfg, name)}. Leave one of them out."
            )
    if cfg.weighting == "dr_grpo" and cfg.scale_rewards == "batch":
        raise UserError("scale_rewards: weighting dr_grpo implies none, got batch. Leave one of them out.")


def is_known(setting: str, value: str) -> bool:
    """Whether the value of a setting of NAMED is one of its names, or may be path.py:function.

    >>> is_known("weighting", "dapo"), is_known("weighting", "my.py:f"), is_known("weighting", "bnpo")
    (True, True, False)
    """
    return value in NAMED[setting] or bool(value.rpartition(":")[0])


def check_function(setting: str, value: str) -> None:
    """Raises UserError for the value of a setting of NAMED that can be neither a name nor path.py:function."""
    if not is_known(setting, value):
        names = f"one of {', '.join(NAMED[setting])}, or " if NAMED[setting] else ""
        raise UserError(f"{setting}: must be {names}path/to/file.py:function, got {value[:60]!r}.")


def _check_kl(cfg: Config) -> None:
    """Settings of the KL to the reference."""
    if cfg.kl_estimator != "k3" and not cfg.beta:
        raise UserError(f"kl_estimator: {cfg.kl_estimator} needs beta > 0, got 0. Leave it out.")
    if cfg.kl_estimator == "k3_weighted" and cfg.surrogate not in USED_BY["ratio"]:
        raise UserError(
            f"kl_estimator: k3_weighted is weighted by the ratio, which {cfg.surrogate[:60]} has not. Say k3 or k2."
        )
    if cfg.kl_estimator == "k1_reward" and cfg.normalize_each_reward:
        raise UserError(
            "kl_estimator: k1_reward is taken off the sum of the rewards, and normalize_each_reward scales each before "
            "it. Say k3, or normalize_each_reward false."
        )
    if cfg.reference_sync_steps and (not cfg.beta or cfg.lora_r):
        problem = "beta is 0" if not cfg.beta else "with lora_r it is the frozen model itself"
        raise UserError(
            f"reference_sync_steps: there is no reference to renew, {problem}, got {cfg.reference_sync_steps}. It "
            "needs beta > 0 and lora_r 0; else leave it out."
        )
    if cfg.reference_mixup != Config().reference_mixup and not cfg.reference_sync_steps:
        raise UserError(f"reference_mixup: it needs reference_sync_steps, got {cfg.reference_mixup:g}. Leave it out.")


def _check_entropy(cfg: Config) -> None:
    """Settings of grpo/training/entropy.py."""
    default, target = Config(), cfg.entropy_target
    for name in ("entropy_coef_step", "entropy_coef_max"):
        if target is None and getattr(cfg, name) != getattr(default, name):
            raise UserError(f"{name}: it needs entropy_target, got {getattr(cfg, name)} without. Leave it out.")
    if target is not None and not 0 < target < math.inf:
        raise UserError(f"entropy_target: must be a finite number of nats > 0, or null, got {target}. Such as 0.2.")
    if target is not None and cfg.entropy_coef > cfg.entropy_coef_max:
        raise UserError(
            f"entropy_coef: must be at most entropy_coef_max {cfg.entropy_coef_max:g}, got {cfg.entropy_coef:g}. "
            "Raise entropy_coef_max."
        )


def _check_choice_of_rows(cfg: Config) -> None:
    """Settings of grpo/training/draws.py."""
    default = Config()
    if cfg.max_rounds < 2:
        raise UserError(f"max_rounds: must be >= 2, got {cfg.max_rounds}. For one round say filter_groups drop.")
    if cfg.max_rounds != default.max_rounds and cfg.filter_groups != "resample":
        raise UserError(f"max_rounds: it acts with filter_groups resample, got {cfg.filter_groups}. Leave it out.")
    if cfg.group_filter != default.group_filter and cfg.filter_groups == "keep":
        raise UserError("group_filter: it acts with filter_groups drop or resample, got keep. Leave it out.")
    ends = cfg.difficulty_range
    if ends is None and cfg.difficulty_rest != default.difficulty_rest:
        raise UserError(f"difficulty_rest: it needs difficulty_range, got {cfg.difficulty_rest}. Leave it out.")
    if ends is not None and not (len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf):
        raise UserError(
            f"difficulty_range: must be [low, high] with low < high, or null, got {ends}. Such as [0.1, 0.9]."
        )
