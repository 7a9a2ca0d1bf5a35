"""Checks of settings that need no data and no model: types, ranges, settings that contradict each other.

jsonargparse has read and converted the values. pydantic then checks their types without conversion, for what
jsonargparse lets pass: null for any setting, true for a number of a Literal, and the values of the `sft` section.
"""

import dataclasses
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import PurePath
from types import NoneType
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from grpo.config.algorithm import check_algorithm
from grpo.config.held_out import check_eval_data, eval_sets
from grpo.config.names import find_path, tracker_names
from grpo.config.settings import Config, prompts_per_step, scales_advantages
from grpo.errors import UserError

MAX_WHOLE = 2**31  # sizes and counts stay below; only the seed may be larger
PATHS = ("output_dir", "runs_dir", "run_name", "model", "data", "chat_template_file", "deepspeed_config")
MAY_BE_EMPTY = ("system_prompt", "prompt_template", "stop")  # or blank
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.A)
REPOSITORY_IN_WORDS = "user/name of letters, digits, -, _ and ."
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,199}", re.A)
TEMPLATE_NAMES = re.compile(  # what every chat template gets, and functions that it calls
    "messages|tools|documents|conversations|chat_template|add_generation_prompt|continue_final_message|"
    "return_assistant_tokens_mask|(bos|eos|unk|sep|pad|cls|mask)_token|additional_special_tokens|raise_exception|"
    "strftime_now|range|dict|lipsum|cycler|joiner|namespace|self"
)
IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    dict: "a mapping",
    dict[str, str]: "a mapping from names to names",
    dict[str, float]: "a mapping from names to numbers",
    dict[str, dict]: "a mapping from names to mappings",
    dict[str, Any]: "a mapping from names to values",
}
RANGES: list[tuple[str, Callable[[Any], bool], str]] = [  # settings, what must hold of each, in words
    (
        "batch_size gradient_accumulation_steps epoch num_minibatches num_iterations max_prompt_length "
        "max_generate_length max_support max_bad_steps micro_batch_tokens rollout_chunk_rows logits_chunk_mb "
        "difficulty_rest",
        lambda value: value >= 1,
        ">= 1",
    ),
    (
        "save_steps eval_steps eval_rows eval_generations log_samples_steps log_completions_steps log_tokens_steps "
        "check_weights_steps top_k seed reward_workers data_rows warmup_steps reference_sync_steps",
        lambda value: value >= 0,
        ">= 0",
    ),
    ("max_steps", lambda value: value is None or value >= 0, ">= 0, or null"),
    ("save_total_limit num_threads rollout_tokens", lambda value: value is None or value >= 1, ">= 1, or null"),
    (
        "lr temperature max_grad_norm logit_clamp advantage_clip max_importance_weight reward_timeout_s push_timeout_s "
        "entropy_coef_step entropy_coef_max log_tokens_mb",
        lambda value: 0 < value < math.inf,
        "a finite number > 0",
    ),
    ("stall_timeout_s rollout_timeout_s", lambda value: 1 <= value < math.inf, "a finite number of seconds >= 1"),
    (
        "beta router_aux_loss_coef entropy_coef weight_decay clip_eps preempt_grace_s",
        lambda value: 0 <= value < math.inf,
        "a finite number >= 0",
    ),
    ("clip_eps_high", lambda value: value is None or 0 <= value < math.inf, ">= 0, or null"),
    (
        "off_policy_threshold max_sampler_gap",
        lambda value: value is None or 0 < value < math.inf,
        "a finite number > 0, or null",
    ),
    ("reward_memory_mb", lambda value: value >= 64, ">= 64"),
    (
        "top_p prompt_length_quantile reference_mixup top_entropy_share",
        lambda value: 0 < value <= 1,
        "in (0, 1]",
    ),
    ("min_p warmup_ratio min_lr_ratio adam_beta1 adam_beta2 lora_dropout", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("max_reward_failures", lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("lora_r", lambda value: 0 <= value <= 2**14, f"0 to {2**14}"),
    ("lora_target_modules", bool, "all-linear, or a list of names"),
]


def check(cfg: Config) -> None:
    """Check types, ranges and combinations of settings. Raises UserError naming the setting."""
    for name, kind in typing.get_type_hints(Config).items():
        check_kind(name, getattr(cfg, name), kind)
    for name in PATHS:
        _check_encodable(name, getattr(cfg, name))
    for one in eval_sets(cfg).values():
        _check_encodable("eval_data", str(one.eval_data or ""))
    for name in cfg.rewards:
        _check_encodable("rewards", name)
    if cfg.run_name is not None and (PurePath(cfg.run_name).is_absolute() or ".." in PurePath(cfg.run_name).parts):
        raise UserError(f"run_name: must be a name below runs_dir, got {cfg.run_name!r}. Choose --runs_dir instead.")
    if cfg.model is None:
        raise UserError("model: none given. Say which: --model <folder or hub name> (nothing at all runs the demo).")
    _check_revision(cfg.model, cfg.model_revision)
    if cfg.push_to_hub is not None and not is_repository(cfg.push_to_hub):
        raise UserError(f"push_to_hub: must be {REPOSITORY_IN_WORDS}, got {cfg.push_to_hub[:80]!r}.")
    if cfg.data is None:
        raise UserError("data: none given. Say which: --data <file, folder or hub name>.")
    is_sft = bool(cfg.sft)  # there rewards only evaluate, and may be missing
    if not cfg.rewards and not is_sft:
        raise UserError("rewards: none given. Say which, with weights: --rewards '{\"correctness_reward\": 1.0}'.")
    if not any(cfg.rewards.values()) and not is_sft:
        raise UserError(f"rewards: every weight is 0, got {cfg.rewards}. Nothing would be learned: weigh at least one.")
    if not all(math.isfinite(weight) for weight in cfg.rewards.values()):
        raise UserError(f"rewards: weights must be finite numbers, got {cfg.rewards}.")
    _check_parameters(cfg)
    if cfg.num_generations < 2:
        raise UserError(
            f"num_generations: must be >= 2, got {cfg.num_generations}: a group of one has no baseline. Try 8."
        )
    for names, holds, allowed in RANGES:
        for name in names.split():
            _require(cfg, name, holds(getattr(cfg, name)), allowed)
    _check_data(cfg)
    if len(set(tracker_names(cfg))) != len(tracker_names(cfg)):
        raise UserError(f"report_to: each tracker once, got {cfg.report_to}.")
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
    _check_adapter(cfg)
    _check_engine(cfg)
    _check_schedule(cfg)
    check_algorithm(cfg)
    if not scales_advantages(cfg) and cfg.advantage_clip != Config().advantage_clip:
        raise UserError(
            f"advantage_clip: it acts on advantages divided by a standard deviation, got {cfg.advantage_clip:g} with "
            f"scale_rewards {cfg.scale_rewards}, weighting {cfg.weighting}. Leave it out."
        )
    if cfg.num_minibatches > prompts_per_step(cfg):
        raise UserError(
            f"num_minibatches: at most one per prompt of a step, {prompts_per_step(cfg)}, got {cfg.num_minibatches}. "
            "Raise batch_size or gradient_accumulation_steps."
        )


def _check_revision(model: str, revision: str | None) -> None:
    if revision is None:
        return
    if find_path(model) is not None or model.startswith((".", "/", "~")):
        raise UserError(
            f"model_revision: {revision[:60]!r} is of a model on the hub, {model} is a folder. Leave it out."
        )
    if "@" in model:
        raise UserError(f"model_revision: {model!r} names a revision already. Leave one of them out.")
    if not REVISION.fullmatch(revision):
        raise UserError(f"model_revision: must be a branch, a tag or a commit, got {revision[:60]!r}.")


def is_repository(name: str) -> bool:
    """Whether a text can be the name of a repository on the hub.

    >>> is_repository("user/name"), is_repository("name"), is_repository("user/a--b")
    (True, False, False)
    """
    ends = (".git", ".", "-")
    return REPOSITORY.fullmatch(name) is not None and "--" not in name and ".." not in name and not name.endswith(ends)


def _check_encodable(setting: str, path: str | None) -> None:
    """Refuse a path that the locale's encoding of file names cannot express."""
    try:
        os.fsencode(path or "")
    except UnicodeEncodeError:
        raise UserError(
            f"{setting}: this locale's encoding of file names, {sys.getfilesystemencoding()}, does not have all "
            f"characters of {path!r}. Choose another name, or set PYTHONUTF8=1."
        ) from None


def _check_adapter(cfg: Config) -> None:
    """Refuse settings of LoRA, 4-bit weights, 8-bit moments and offload that would have no effect."""
    alpha = cfg.lora_alpha
    _require(cfg, "lora_alpha", alpha is None or (math.isfinite(alpha) and alpha > 0), "a finite number > 0, or null")
    default = Config()
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit"):
        if not cfg.lora_r and getattr(cfg, name) != getattr(default, name):
            raise UserError(f"{name}: it needs an adapter, got lora_r 0. Say --lora_r 16, or leave {name} out.")
    if cfg.backend == "deepspeed" and (cfg.load_in_4bit or cfg.optimizer != "adamw"):
        name = "load_in_4bit" if cfg.load_in_4bit else "optimizer"
        raise UserError(f"{name}: {str(getattr(cfg, name)).lower()} needs --backend ddp or single, got deepspeed.")
    if cfg.reference_offload and (not cfg.beta or cfg.lora_r):
        raise UserError("reference_offload: there is no reference to move, it needs beta > 0 and lora_r 0.")


def _check_schedule(cfg: Config) -> None:
    """Settings of grpo/training/schedule.py."""
    if cfg.warmup_steps and cfg.warmup_ratio:
        raise UserError(
            f"warmup_steps, warmup_ratio: set one, got {cfg.warmup_steps} and {cfg.warmup_ratio:g}. Set the other to 0."
        )
    if (cfg.lr_schedule == "cosine_with_min_lr") != (cfg.min_lr_ratio > 0):
        raise UserError(
            f"min_lr_ratio: must be above 0 with lr_schedule cosine_with_min_lr and 0 with others, got "
            f"{cfg.min_lr_ratio:g} with {cfg.lr_schedule}. Such as 0.1 with cosine_with_min_lr."
        )
    if cfg.lr_schedule == "constant_with_warmup" and not (cfg.warmup_steps or cfg.warmup_ratio):
        raise UserError("lr_schedule: constant_with_warmup needs warmup_steps or warmup_ratio, got 0. Or say constant.")


def _check_data(cfg: Config) -> None:
    """Settings of grpo/data/questions.py and grpo/data/recipe.py."""
    longest = cfg.max_answer_length
    _require(cfg, "max_answer_length", longest is None or longest >= 1, ">= 1, or null")
    check_eval_data(cfg)
    if isinstance(cfg.eval_data, str) and (cfg.eval_data[:1], cfg.eval_data[-1:]) in (
        ("{", "}"),
        ("[", "]"),
    ):  # no texts, or no mapping
        kind = typing.get_type_hints(Config)["eval_data"]
        raise UserError(f"eval_data: must be {in_words(kind)}, got {shown(cfg.eval_data)}. Write {{name: file}}.")
    size = cfg.eval_split_size
    whole = size >= 1 and size == int(size) if math.isfinite(size) else False
    _require(cfg, "eval_split_size", 0 <= size < 1 or whole, "a share below 1 or a whole number of rows")
    if size and cfg.eval_data is not None:
        raise UserError(f"eval_split_size: must be 0 beside eval_data {cfg.eval_data!r}, got {size:g}. Choose one.")
    if any(not text or "\ufffd" in text for text in cfg.stop):  # blanks are a text: a blank line may end a completion
        raise UserError(f"stop: each text must have characters, and none may be U+FFFD, got {cfg.stop}. Mend the list.")
    if escaped := [text for text in cfg.stop if re.fullmatch(r"(\\[nrt])+", text)]:
        raise UserError(
            f"stop: {escaped[0]} is {len(escaped[0])} characters, with a backslash, which YAML reads only in double "
            f'quotes. Write ["{escaped[0]}"], on the command line \'["{escaped[0]}"]\'.'
        )
    if cfg.answer_column is None and longest is not None:
        raise UserError(f"max_answer_length: {longest} needs an answer_column, got null.")
    if cfg.chat_template_file is not None and cfg.chat_template is False:
        raise UserError(f"chat_template_file: {cfg.chat_template_file!r} has no effect beside chat_template false.")
    if problem := kwargs_problem(cfg.chat_template_kwargs):
        raise UserError(f"chat_template_kwargs: {problem}")
    if cfg.chat_template_kwargs and cfg.chat_template is False:
        raise UserError(f"chat_template_kwargs: {cfg.chat_template_kwargs} has no effect beside chat_template false.")
    if (cfg.example_question is None) != (cfg.example_answer is None):
        raise UserError("example_question, example_answer: set both, or neither.")
    if len(set(cfg.column_names.values())) != len(cfg.column_names):
        raise UserError(f"column_names: two columns get the same name, got {cfg.column_names}.")


def kwargs_problem(kwargs: dict[Any, Any]) -> str | None:
    """Why these cannot be variables of a chat template; None when they can."""
    for name, value in kwargs.items():
        if not isinstance(name, str) or not name.isidentifier() or not _is_json(value):
            return (
                f"{ascii(name)[:60]} must be a name, and its value text, a number, true, false, null, or a list or "
                f"mapping of those, got {ascii(value)[:60]}."
            )
        if TEMPLATE_NAMES.fullmatch(name):
            return f"{name} is given to every template by the trainer. Leave it out."
    return None


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than the setting's, and numbers and texts that no setting can use.

    Raises UserError naming the setting, what is allowed and what was given.
    """
    if not has_type(value, kind):
        raise UserError(f"{name}: must be {in_words(kind)}, got {shown(value)}.")
    whole = isinstance(value, int) and not isinstance(value, bool)
    limit = 2**63 if name == "seed" else MAX_WHOLE
    if whole and not -limit < value < limit:
        raise UserError(f"{name}: must be less than {limit}, got {str(value)[:30] if abs(value) < 10**40 else 'more'}.")
    held = [*value] if isinstance(value, (list, dict)) else [value]
    for text in (one for one in held if isinstance(one, str)):
        if not text.strip() and name not in MAY_BE_EMPTY:
            raise UserError(f"{name}: must not be empty. Say null to leave it out, where that is allowed.")
        if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise UserError(f"{name}: must be text in UTF-8 without NUL, got {ascii(text)[:60]}.")


def _check_parameters(cfg: Config) -> None:
    """Refuse parameters of a reward that is not in use, and values that JSON cannot hold."""
    for name, parameters in cfg.reward_parameters.items():
        if name not in cfg.rewards:
            raise UserError(
                f"reward_parameters: {name[:60]!r} is none of the rewards {', '.join(cfg.rewards)[:200]}. Name one of "
                "them, spelt as in rewards."
            )
        for key, value in parameters.items():
            if not isinstance(key, str) or not key.isidentifier() or not _is_json(value):
                raise UserError(
                    f"reward_parameters: {name[:60]}: {ascii(key)[:60]} must be a name, and its value text, a number, "
                    f"true, false, null, or a list or mapping of those, got {ascii(value)[:60]}."
                )


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(key) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < MAX_WHOLE)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of this type as it stands; a whole number is also a float."""
    try:
        typed = TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return typing.get_origin(kind) is not Literal or type(typed) is type(value)  # pydantic takes True for Literal[1]


def in_words(kind: Any) -> str:
    """What a setting of this type takes, in words.

    >>> in_words(int | None), in_words(Literal["a", "b"]), in_words(bool | None), in_words(list[str])
    ('a whole number or null', 'one of a, b', 'true, false or null', 'a list of texts')
    >>> in_words(Literal["a", "b"] | Literal["none"] | list[Literal["a", "b"]])
    'one of a, b, none, or a list of a, b'
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        kinds = "numbers" if inner[0] is float else ", ".join(map(str, typing.get_args(inner[0]))) or "texts"
        return f"a list of {kinds}"
    if kind in IN_WORDS:
        return IN_WORDS[kind]
    choices = [str(value) for one in inner if typing.get_origin(one) is Literal for value in typing.get_args(one)]
    if choices:
        others = [in_words(one) for one in inner if typing.get_origin(one) is not Literal]
        first = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)},"
        return " or ".join([first, *others])
    return " or ".join(in_words(one) for one in inner).replace("true or false or", "true, false or")


def shown(value: Any) -> str:
    """A value as it is written in YAML, cut.

    >>> shown(None), shown(True), shown("abc"), shown([1])
    ('null', 'true', "'abc'", '[1]')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value[:60]) if isinstance(value, str) else str(value)[:60]


def field_names() -> list[str]:
    """The names of all settings."""
    return [field.name for field in dataclasses.fields(Config)]


def _require(cfg: Config, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name}: must be {allowed}, got {getattr(cfg, name)}.")


def _check_engine(cfg: Config) -> None:
    """The settings of vLLM's rollouts. Raises UserError."""
    if cfg.rollout_engine == "native":
        for name in ("rollout_server", "rollout_transfer", "max_sampler_gap", "vllm_args", "rollout_ahead"):
            if getattr(cfg, name) and getattr(cfg, name) != "http":
                raise UserError(f"{name}: it needs --rollout_engine vllm, got native.")
        return
    alone = {"filter_groups": cfg.filter_groups == "resample", "sampler_correction": cfg.sampler_correction == "none"}
    for name, holds in (alone | {"difficulty_range": cfg.difficulty_range}).items():
        if cfg.rollout_ahead and holds:
            raise UserError(f"{name}: {getattr(cfg, name)} does not go with rollout_ahead 1. Use --rollout_ahead 0.")
    if cfg.deterministic:
        raise UserError("deterministic: vllm promises no equal bits. Use --rollout_engine native.")
    limit = cfg.stall_timeout_s
    _require(cfg, "rollout_timeout_s", cfg.rollout_timeout_s < limit, f"less than stall_timeout_s, which is {limit:g}")
    if cfg.load_in_4bit:
        raise UserError("load_in_4bit: its merged weights are not those of a server. Use --rollout_engine native.")
    if cfg.rollout_server is not None and cfg.vllm_args:
        raise UserError("vllm_args: they are for a server that training starts. Give them to launch/vllm_server.sh.")
    for url in [cfg.rollout_server] if isinstance(cfg.rollout_server, str) else cfg.rollout_server or []:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
            raise UserError(f"rollout_server: must be http://host:port, or a list of such, got {url[:100]!r}.")
        if parts.scheme == "https" and cfg.rollout_transfer == "broadcast":
            raise UserError(f"rollout_transfer: a broadcast does not go through {url[:100]!r}. Use http.")
