"""The `sft:` section of a configuration: other values for the supervised stage, and settings of that stage alone.

One file describes both stages. The settings at its top level are GRPO's; in `python -m grpo.sft` those of the section
replace them. Settings that have no effect without rollouts are dropped, so that they may differ between the stages;
within the section they are refused.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.config.checks import check, check_kind
from grpo.config.messages import meant
from grpo.config.names import OLD_NAMES
from grpo.config.settings import Config
from grpo.errors import UserError

OF_ROLLOUTS = frozenset(
    {  # settings without effect here: a supervised step samples nothing
        "num_generations",
        "num_minibatches",
        "num_iterations",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_support",
        "algorithm",
        "surrogate",
        "ratio",
        "weighting",
        "clip_eps",
        "clip_eps_high",
        "clip_ratio_max",
        "sapo_temperature",
        "sapo_temperature_negative",
        "beta",
        "kl_estimator",
        "reference_sync_steps",
        "reference_mixup",
        "entropy_coef",
        "entropy_target",
        "entropy_coef_step",
        "entropy_coef_max",
        "top_entropy_share",
        "baseline",
        "scale_rewards",
        "normalize_each_reward",
        "advantage",
        "advantage_clip",
        "filter_groups",
        "group_filter",
        "max_rounds",
        "difficulty_range",
        "difficulty_rest",
        "truncated",
        "sampler_correction",
        "rollout_engine",
        "rollout_server",
        "rollout_transfer",
        "rollout_timeout_s",
        "max_sampler_gap",
        "vllm_args",
        "rollout_ahead",
        "max_importance_weight",
        "off_policy_threshold",
        "max_reward_failures",
        "reference_offload",
        "eval_generations",
        "log_samples_steps",
        "log_completions_steps",
        "log_tokens_steps",
        "log_tokens_mb",
    }
)
WARMUP = ("warmup_ratio", "warmup_steps")  # two ways to set the same: one in the section replaces both
SUFFIX = "_sft"  # of output_dir, run_name and push_to_hub, unless the section or the command line names others


@dataclass(frozen=True)
class SftSettings:
    """Settings of the supervised stage alone."""

    solution_column: str | None = None
    """Column with the reference solution, as it stands in the data; null: solution_template says all."""
    solution_template: str | None = None
    """Text to be learned; {name} stands for a column, {answer} for the gold answer, {solution} for solution_column."""
    solution_remove: list[str] = field(default_factory=list)
    """Texts that are taken out of the cells of solution_template, such as <think>."""
    loss_on: Literal["completion", "all"] = "completion"
    """completion: on the solution and the end token. all: on the prompt too, but its first token."""
    packing: bool = False
    """Put several texts into one row, none of which sees another: less padding where lengths differ much."""


OWN = typing.get_type_hints(SftSettings)
KINDS = {
    name: kind for name, kind in typing.get_type_hints(Config).items() if name not in OF_ROLLOUTS and name != "sft"
}


def own_settings(cfg: Config) -> SftSettings:
    """The settings in the field `sft` of the supervised stage's Config."""
    return SftSettings(**cfg.sft)


def refuse_rollout_setting(name: str) -> None:
    """Raises UserError for the name of a setting that has no effect in the supervised stage."""
    if OLD_NAMES.get(name, name) in OF_ROLLOUTS:
        raise UserError(f"sft: {name} has no effect there: no completions are sampled. Set it outside of sft.")


def check_section(section: dict[str, Any]) -> None:
    """Check names and types of an `sft:` section. Raises UserError, whose text begins with `sft:`."""
    for name, value in section.items():
        refuse_rollout_setting(name)
        kind = {**KINDS, **OWN}.get(name)
        if kind is None:
            if value is None and isinstance(name, str) and ":" in name:
                raise UserError(f"sft: a space is missing after the colon in {name[:60]!r}. Write name: value.")
            end = meant(str(name), [*KINDS, *OWN])
            if not end.startswith(":") and meant(str(name), OF_ROLLOUTS).startswith(":"):  # an option of TRL
                raise UserError(f"sft: {name} has no effect there: no completions are sampled. Leave it out.")
            hint = end or " (see python -m grpo.sft --help)"
            raise UserError(f"sft: unknown setting {ascii(name)[:60]}{hint}")
        with _prefixed_errors():
            check_kind(name, value, kind)


def stage_values(values: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """All settings of the supervised stage by name: those shared with GRPO, replaced by those of the section.

    >>> values = stage_values({"output_dir": "./output/", "run_name": "a", "lr": 1.0, "beta": 2.0}, {"lr": 3.0})
    >>> values["output_dir"], values["run_name"], values["lr"], "beta" in values
    ('./output_sft', 'a_sft', 3.0, False)
    """
    shared = {name: value for name, value in values.items() if name in KINDS}
    for name in ("output_dir", "run_name", "push_to_hub"):
        if shared.get(name) is not None:
            shared[name] = shared[name].rstrip("/") + SUFFIX
    if any(section.get(name) for name in WARMUP):
        shared |= dict.fromkeys(WARMUP, 0)
    if section.get("lr_schedule", "cosine_with_min_lr") != "cosine_with_min_lr":
        shared["min_lr_ratio"] = 0.0
    return {**dataclasses.asdict(SftSettings()), **shared, **section}


def stage_config(values: dict[str, Any]) -> Config:
    """The Config of the supervised stage from the result of `stage_values`. Raises UserError."""
    own = {name: values[name] for name in OWN}
    for name, kind in OWN.items():
        check_kind(name, own[name], kind)
    cfg = Config(**{name: value for name, value in values.items() if name in KINDS}, sft=own)
    check(cfg)
    if cfg.rewards and cfg.eval_split_size == 0 and cfg.eval_data is None:
        cfg = dataclasses.replace(cfg, rewards={}, reward_parameters={})  # they only score held-out questions
    if own["solution_column"] is None and own["solution_template"] is None:
        raise UserError("solution_column: none given, nor a solution_template. Say which column holds the solution.")
    if "" in own["solution_remove"]:
        raise UserError("solution_remove: must not hold an empty text.")
    return cfg


def check_stage(values: dict[str, Any], section: dict[str, Any]) -> None:
    """Check the supervised stage as far as possible without its command line. Raises UserError."""
    check_section(section)
    with _prefixed_errors():
        stage_config(stage_values(values, section))


@contextlib.contextmanager
def _prefixed_errors() -> Iterator[None]:
    """Make the text of a UserError begin with `sft:`."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith("sft:") else UserError(f"sft: {error}") from None
