"""`python -m grpo.config --from_trl recipe.yaml --processes 8`: a recipe of TRL or open-r1 as settings here.

Options that the recipe leaves at TRL's defaults are written out where ours differ, so that the run means the same.
What cannot be carried over, and what means something else, is said in comments above the settings.
"""

import math
import typing
from typing import Any

import yaml

from grpo.config.algorithm import USED_BY
from grpo.config.checks import check, has_type, shown
from grpo.config.settings import Config
from grpo.config.trl_names import ROWS, VALUES
from grpo.config.trl_recipe import OURS, Recipe, as_number, plain
from grpo.config.trl_rewards import BY_NAME, OPEN_R1_DEFAULT
from grpo.config.trl_steps import engine, evaluation, length, reference, saving, tracking
from grpo.errors import UserError

COPIED = [  # options whose value is also ours
    "model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split", "dataset_prompt_column",
    "chat_template_kwargs", "system_prompt", "shuffle_dataset", "max_prompt_length", "test_split_size",
    "num_generations", "num_iterations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "epsilon",
    "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "beta", "router_aux_loss_coef",
    "off_policy_mask_threshold", "entropy_coef", "top_entropy_quantile", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "max_grad_norm", "gradient_checkpointing", "seed", "full_determinism", "output_dir",
    "save_total_limit", "run_name", "project", "wandb_project", "trackio_project",
]  # fmt: skip
TRL_DEFAULTS: dict[str, Any] = {  # of copied options, where ours differ
    "num_generations": 8,
    "max_completion_length": 512,
    "gradient_checkpointing": True,
    "dataset_prompt_column": "prompt",
    "max_prompt_length": 1024,  # TRL has no limit
}
HARMLESS = {  # values that change nothing, beside null, false, 0 and empty ones
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "repetition_penalty": 1.0,
    "adam_epsilon": 1e-8,
    "train_sampling_strategy": "random",
    "bnb_4bit_quant_type": "nf4",
}
KINDS = typing.get_type_hints(Config)


def convert(options: dict[str, Any], processes: int, rows: int | None = None) -> Recipe:
    """Settings for a recipe's options. Raises UserError for values that cannot be converted."""
    recipe = Recipe(options, processes, rows)
    for part in (
        _copy,
        _batch,
        _data,
        _rewards,
        _algorithm,
        _entropy,
        _sampling,
        engine,
        _schedule,
        _adapter,
        _machine,
    ):
        part(recipe)
    run = length(recipe)  # reads what _batch has written
    for write in (evaluation, saving, reference, tracking):
        write(recipe, run)
    for name, value in options.items():
        is_idle = name in ROWS and ROWS[name].idle
        is_harmless = not value or plain(value) == HARMLESS.get(name)
        if name not in recipe.read and not is_harmless and not is_idle:
            recipe.lose(name)
    return recipe


def as_yaml(recipe: Recipe, source: str) -> str:
    """The settings as YAML, under comments that say what is not the same."""
    idle = [name for name in recipe.options if name in ROWS and ROWS[name].idle and name not in recipe.read]
    blocks = {
        "To be given": recipe.missing,
        "Not carried over": recipe.lost,
        "Means something else": recipe.changed,
        "TRL's defaults that differ from ours, written out": [", ".join(recipe.defaults)] if recipe.defaults else [],
        "Without counterpart, and without effect on what is learned": [", ".join(idle)] if idle else [],
    }
    lines = [f"# From {source}, with the defaults of TRL 1.16, for {recipe.processes} processes."]
    for title, entries in blocks.items():
        lines += [f"# {title}:", *(f"#   {entry}" for entry in entries)] if entries else []
    order = [name for name in KINDS if name in recipe.settings]
    settings = {name: recipe.settings[name] for name in [*order, *recipe.settings]}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10**6)
    return "\n".join(["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]) + "\n" + text


def check_result(recipe: Recipe) -> None:
    """Refuse values that our settings refuse. What the recipe lacks may be given on the command line."""
    lacking = {"model": "m", "data": "d", "rewards": {"r": 1.0}}
    check(Config(**{**lacking, **recipe.settings}))


def _copy(recipe: Recipe) -> None:
    for name in COPIED:
        setting, default = ROWS[name].here, TRL_DEFAULTS.get(name)
        value = recipe.get(name, default)
        if value is None or (value == "" and KINDS.get(setting) not in (int, float)):
            continue
        kind = KINDS.get(setting)
        value = recipe.mapping(name) if name == "chat_template_kwargs" else value
        if kind in (int, float, float | None, int | None):
            value = as_number(name, value, whole=kind in (int, int | None))
        elif kind is bool:
            value = recipe.flag(name, bool(default))
        recipe.put(setting, value, name)
    if recipe.settings.get("max_grad_norm") == 0:
        recipe.settings["max_grad_norm"] = 1e9
    if recipe.has("activation_checkpointing"):  # the newer name
        recipe.put("gradient_checkpointing", recipe.flag("activation_checkpointing"), "activation_checkpointing")


def _batch(recipe: Recipe) -> None:
    """P and the number of minibatches. TRL samples per_device x processes x steps_per_generation completions at once,
    and updates the weights after gradient_accumulation_steps parts of per_device x processes."""
    per_device = recipe.number("per_device_train_batch_size", 8, whole=True)
    accumulated = recipe.number("gradient_accumulation_steps", 1, whole=True)
    group = recipe.settings["num_generations"]
    part = per_device * recipe.processes
    if recipe.has("generation_batch_size") and recipe.has("steps_per_generation"):
        raise UserError("generation_batch_size, steps_per_generation: TRL takes one of them, got both.")
    completions = recipe.number("generation_batch_size", 0, whole=True)
    passes = recipe.settings.get("num_iterations", 1)
    if min(per_device, accumulated, group, passes) < 1:
        raise UserError(
            "per_device_train_batch_size, gradient_accumulation_steps, num_generations, num_iterations: must be >= 1, "
            f"got {per_device}, {accumulated}, {group}, {passes}."
        )
    if completions % part or completions < 0:
        raise UserError(
            f"generation_batch_size: must be a multiple of per_device_train_batch_size x processes = {per_device} x "
            f"{recipe.processes}, got {completions}."
        )
    parts = recipe.number("steps_per_generation", completions // part or accumulated, whole=True)
    if parts < 1 or (parts % accumulated and (accumulated % parts or passes > 1)):
        raise UserError(
            f"steps_per_generation: {parts} must be a multiple of gradient_accumulation_steps {accumulated}, so that "
            "updates do not mix passes over the samples."
        )
    if part * parts % group:
        raise UserError(
            f"num_generations: {group} must divide per_device_train_batch_size x processes x steps_per_generation = "
            f"{per_device} x {recipe.processes} x {parts} = {part * parts}. Check --processes."
        )
    recipe.settings["batch_size"] = part * max(parts, accumulated) // group
    recipe.put("num_minibatches", max(1, parts // accumulated), "steps_per_generation", "generation_batch_size")
    recipe.settings["gradient_accumulation_steps"] = 1


def _data(recipe: Recipe) -> None:
    for name, setting in (("model_name_or_path", "model"), ("dataset_name", "data")):
        if not recipe.has(name):
            recipe.missing.append(f"{setting}: the recipe has no {name}.")
    if recipe.get("model_revision", "main") != "main":
        recipe.put("model_revision", recipe.get("model_revision"), "model_revision")
    if configs := recipe.get("dataset_configs"):
        recipe.put("data_config", configs[0] if isinstance(configs, list) else configs, "dataset_configs")
    if recipe.get("chat_template") is not None:
        recipe.lose("chat_template", "Put the text into a file, and say chat_template_file: FILE.")
    if recipe.has("max_prompt_length"):
        recipe.changed.append("max_prompt_length: longer prompts are left out and counted, never cut.")
    else:
        recipe.changed.append(
            "max_prompt_length: TRL takes prompts of any length; here 1024 tokens, and longer ones are counted."
        )
    recipe.changed.append(
        "question_column: a question that is text is put into the chat template; TRL takes it as it stands "
        "(chat_template: false)."
    )


def _rewards(recipe: Recipe) -> None:
    names = recipe.get("reward_funcs", [])
    names = [names] if not isinstance(names, list) else names
    weights = recipe.get("reward_weights", [1.0] * len(names))
    weights = [plain(weight) for weight in (weights if isinstance(weights, list) else [weights])]
    if not has_type(weights, list[float]) or not has_type(names, list[str]) or len(weights) != len(names):
        raise UserError(
            f"reward_weights: must be one number for each of the {len(names)} reward_funcs, a list of names, got "
            f"{shown(weights)} and {shown(names)}."
        )
    rewards: dict[str, float] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name, weight in zip(names, weights, strict=True):
        theirs = BY_NAME.get(name)
        ours = theirs.here if theirs and theirs.here else _own_reward(recipe, name)
        ours = f"{ours}@{name}" if ours in rewards else ours  # a second one of the same rule has a label
        if theirs and theirs.here:
            set_by = {own: recipe.get(option) for own, option in theirs.options.items() if recipe.has(option)}
            parameters |= {ours: {**theirs.parameters, **set_by}} if theirs.parameters else {}
            recipe.changed += [f"{ours}, {name} there: {theirs.note}"] if theirs.note else []
        if theirs and theirs.here == "repetition_reward":
            weight *= -recipe.number("repetition_max_penalty", -1.0)
        rewards[ours] = weight
    if any("." in name for name in names):
        recipe.changed.append(
            "rewards: completions are strings; message lists, as for chats in TRL: reward_inputs: messages."
        )
    recipe.read |= {option for one in BY_NAME.values() for option in one.options.values()} | {"repetition_max_penalty"}
    if folder := recipe.get("reward_model_name_or_path"):
        rewards["model_reward"], parameters["model_reward"] = 1.0, {"folder": folder}
    if rewards:
        recipe.put("rewards", rewards, "reward_funcs", "reward_model_name_or_path")
    else:
        usual = {BY_NAME[name].here: 1.0 for name in OPEN_R1_DEFAULT}
        recipe.missing.append(f"rewards: the recipe has no reward_funcs; open-r1's default is {_flow(usual)}.")
    if parameters:
        recipe.settings["reward_parameters"] = parameters
    golds = [BY_NAME[name].reads_gold for name in names if name in BY_NAME]
    recipe.put("answer_column", "solution" if any(golds) or not rewards else None)


def _own_reward(recipe: Recipe, name: str) -> str:
    """A function of the user's own: theirs by its path, or one to be written."""
    module, _, function = name.rpartition(".")
    if module:
        return f"{module.replace('.', '/')}.py:{function}"
    ours = f"my_rewards.py:{name.removesuffix('_reward')}_reward"
    note = BY_NAME[name].note if name in BY_NAME else "It is none of TRL's or open-r1's."
    recipe.lost.append(f"reward_funcs: {name}. {note} Write {ours}, or name another.")
    return ours


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix("\n...")


def _algorithm(recipe: Recipe) -> None:
    loss = recipe.get("loss_type", "dapo")
    surrogate = loss if loss in ("cispo", "sapo") else "ppo_clip"
    weighting = "grpo" if loss == "sapo" else loss if loss in ("grpo", "dapo", "dr_grpo") else "dapo"
    recipe.put("weighting", weighting, "loss_type")
    if surrogate != "ppo_clip":
        recipe.settings["surrogate"] = surrogate
    if loss == "bnpo":
        recipe.changed.append("weighting: bnpo takes the mean over the tokens of a process's part, dapo over all.")
    elif loss not in (weighting, surrogate):
        recipe.lose("loss_type", "PPO's clip with dapo is written; for this one write surrogate: path.py:function.")
    if surrogate == "cispo":  # theirs is the bound of the weight itself
        bound = float(recipe.get("epsilon_high", recipe.get("epsilon", 0.2)))
        recipe.settings["clip_eps_high"] = max(0.0, round(bound - 1, 9))
    for setting, users in USED_BY.items():  # theirs are ignored where they have no effect
        if surrogate not in users:
            recipe.settings.pop(setting, None)
    if recipe.get("importance_sampling_level", "token") == "sequence":
        recipe.put("ratio", "sequence", "importance_sampling_level")
    if recipe.get("multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum":
        recipe.put("normalize_each_reward", True, "multi_objective_aggregation")
        recipe.settings |= {"baseline": "batch", "scale_rewards": "batch"}
    else:
        scale = str(recipe.get("scale_rewards", "group")).lower()
        scale = VALUES["scale_rewards"].get(scale, scale)
        if scale in ("group", "none") or (scale == "batch" and weighting != "dr_grpo"):
            recipe.put("scale_rewards", scale, "scale_rewards")
        else:
            recipe.lose("scale_rewards")
        if weighting == "dr_grpo" and scale != "none":
            recipe.changed.append("weighting: dr_grpo implies scale_rewards none here; TRL divides by the deviation.")
        if recipe.settings["num_generations"] > 101 and scale == "group" and weighting != "dr_grpo":
            recipe.settings["advantage_clip"] = float(recipe.settings["num_generations"])  # never binds, as in TRL
    if recipe.flag("mask_truncated_completions", False):
        recipe.put("truncated", "mask", "mask_truncated_completions")
    if recipe.flag("use_bias_correction_kl", True) and recipe.settings.get("beta"):
        recipe.settings["kl_estimator"] = "k3_weighted"


def _entropy(recipe: Recipe) -> None:
    if recipe.flag("use_adaptive_entropy"):
        recipe.put("entropy_target", recipe.number("entropy_target", 0.2), "use_adaptive_entropy")
        recipe.put("entropy_coef_step", recipe.number("entropy_coef_delta", 0.005), "entropy_coef_delta")
        recipe.put("entropy_coef_max", recipe.number("entropy_coef_max", 1.0), "entropy_coef_max")
    else:  # theirs are ignored
        recipe.read |= {"entropy_target", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min"}
    share = recipe.settings.get("top_entropy_share", 1.0)
    if share < 1 or recipe.settings.get("entropy_coef") or "entropy_target" in recipe.settings:
        recipe.changed.append("entropy: quantile and mean are over a minibatch; in TRL over each micro-batch.")


def _sampling(recipe: Recipe) -> None:
    options = dict(recipe.mapping("generation_kwargs"))
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if name in options:
            recipe.settings[name] = as_number(name, options.pop(name), whole=name == "top_k")
    stop = options.pop("stop", None) or options.pop("stop_strings", None)
    if stop:
        recipe.put("stop", [stop] if isinstance(stop, str) else stop, "generation_kwargs")
    if options:
        recipe.lose("generation_kwargs", f"No setting for {', '.join(map(str, options))}.")
    if recipe.settings.get("top_k", 0) < 0:  # vLLM's way to say that it is off
        recipe.settings["top_k"] = 0
    if recipe.settings.get("top_k", 0) > OURS.max_support:
        recipe.settings["max_support"] = recipe.settings["top_k"]
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if on := [name for name, value in off.items() if recipe.settings.get(name, value) != value]:
        recipe.changed.append(
            f"{', '.join(on)}: at most max_support tokens are kept, and log-probs are those of what is kept."
        )


def _schedule(recipe: Recipe) -> None:
    name = recipe.get("lr_scheduler_type", "linear")
    options = dict(recipe.mapping("lr_scheduler_kwargs"))
    steps, ratio = recipe.number("warmup_steps", 0), recipe.number("warmup_ratio", 0)
    if 0 < steps < 1:
        steps, ratio = 0, steps
    lowest = as_number("min_lr", options.pop("min_lr", 0)) / (recipe.settings.get("lr") or OURS.lr)
    lowest = as_number("min_lr_rate", options.pop("min_lr_rate", lowest))
    if name == "constant":
        if steps or ratio:
            recipe.changed.append("lr_schedule: TRL's constant ignores warmup, so it is left out.")
        steps = ratio = 0
    elif name == "constant_with_warmup" and not (steps or ratio):
        name = "constant"
    elif name == "cosine_with_min_lr" and not lowest:
        name = "cosine"
    if name == "cosine_with_min_lr":
        recipe.put("min_lr_ratio", lowest, "lr_scheduler_kwargs")
    if name not in ("constant", "linear", "cosine", "constant_with_warmup", "cosine_with_min_lr"):
        recipe.lose("lr_scheduler_type", "linear is written.")
        name = "linear"
    if options:
        recipe.lose("lr_scheduler_kwargs", f"No setting for {', '.join(map(str, options))}.")
    recipe.put("lr_schedule", name, "lr_scheduler_type")
    if steps:
        recipe.put("warmup_steps", int(steps), "warmup_steps")
    elif ratio:
        recipe.put("warmup_ratio", ratio, "warmup_ratio", "warmup_steps")
    if steps or ratio:
        recipe.changed.append("warmup: the first update has a rate above 0; in TRL it is 0.")


def _adapter(recipe: Recipe) -> None:
    adapter = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit")
    if not recipe.flag("use_peft"):
        recipe.read |= set(adapter) | set(ROWS["use_dora"].names.split())
        return
    rank = recipe.number("lora_r", 16, whole=True)
    alpha = recipe.number("lora_alpha", 32)
    recipe.put("lora_r", rank, "lora_r")
    recipe.put("lora_alpha", alpha * math.sqrt(rank) if recipe.flag("use_rslora") else alpha, "lora_alpha")
    if recipe.number("lora_dropout", 0.05):
        recipe.changed.append(f"lora_dropout: {recipe.get('lora_dropout', 0.05)} there, TRL's default 0.05; 0 here.")
    layers = recipe.get("lora_target_modules", ["q_proj", "v_proj"])
    layers = [str(name).strip(" ,\"'") for name in layers] if isinstance(layers, list) else layers
    if layers == ["all-linear"]:
        layers = "all-linear"
    if isinstance(layers, str) and layers != "all-linear":
        layers = [layers]
    recipe.put("lora_target_modules", layers, "lora_target_modules")
    if recipe.flag("load_in_4bit"):
        recipe.put("load_in_4bit", True, "load_in_4bit")


def _machine(recipe: Recipe) -> None:
    half = recipe.flag("fp16")
    recipe.put("dtype", "bf16" if recipe.flag("bf16", not half) or half else "fp32", "bf16", "fp16")
    if half:
        recipe.lose("fp16")
    weights = recipe.get("dtype") or recipe.get("torch_dtype", "float32")
    if weights != "float32":
        recipe.changed.append(f"dtype: {weights} was the type of the weights; weights and optimizer state are fp32.")
    if recipe.flag("use_cpu") or recipe.flag("no_cuda"):
        recipe.put("device", "cpu", "use_cpu", "no_cuda")
    optimizer = str(recipe.get("optim", "adamw_torch_fused"))
    if optimizer in VALUES["optimizer"]:
        recipe.put("optimizer", VALUES["optimizer"][optimizer], "optim")
    else:
        recipe.lose("optim", "adamw is used.")
    config = recipe.get("deepspeed")
    if isinstance(config, str) and not config.startswith("{"):
        recipe.put("backend", "deepspeed", "deepspeed")
        recipe.put("deepspeed_config", config, "deepspeed")
    elif config:
        recipe.lose("deepspeed", "Write it into a file: backend: deepspeed, deepspeed_config: FILE.")
