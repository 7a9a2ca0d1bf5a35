"""Counts of a recipe of TRL, in updates of the weights, as steps here; saving, trackers, and its engine.

A step samples once and updates num_minibatches x num_iterations times; TRL counts each update.
"""

import math
import typing
from dataclasses import dataclass
from typing import Any

from grpo.config.settings import TrackerName
from grpo.config.trl_recipe import Recipe
from grpo.errors import UserError

TRACKERS = typing.get_args(TrackerName)
EVALUATES = ("eval_strategy", "evaluation_strategy")  # the second is the older name


@dataclass(frozen=True)
class Run:
    """The length of the run, as far as it is known."""

    updates_per_step: int
    num_steps: int | None = None
    steps_per_epoch: float | None = None

    def steps(self, updates: float) -> int:
        """Steps that make so many updates, at least one.

        >>> Run(4).steps(10), Run(4).steps(1)
        (3, 1)
        """
        return max(1, math.ceil(updates / self.updates_per_step))

    def interval(self, every: float) -> int | None:
        """Steps for an interval in updates, or for a share of the run below 1; None: its length is not known."""
        if every >= 1:
            return self.steps(every)
        return None if self.num_steps is None else max(1, math.ceil(every * self.num_steps))


def length(recipe: Recipe) -> Run:
    """Write max_steps or epoch. Raises UserError."""
    settings = recipe.settings
    run = Run(settings.get("num_minibatches", 1) * settings.get("num_iterations", 1))
    max_steps = recipe.number("max_steps", -1, whole=True)
    epochs = recipe.number("num_train_epochs", 3.0)
    if recipe.rows is not None:
        prompts = settings["batch_size"]
        if recipe.rows < prompts:
            raise UserError(f"rows: TRL needs at least one full step of {prompts} questions, got {recipe.rows}.")
        per_epoch = recipe.rows // prompts
        run = Run(run.updates_per_step, math.ceil(epochs * per_epoch), per_epoch)
    if max_steps > 0:
        run = Run(run.updates_per_step, run.steps(max_steps), run.steps_per_epoch)
    if max_steps > 0 or run.num_steps is not None:
        recipe.put("max_steps", run.num_steps, "max_steps", "num_train_epochs")
    else:
        recipe.put("epoch", max(1, math.ceil(epochs)), "num_train_epochs")
        if epochs != int(epochs):
            recipe.lose("num_train_epochs", "epoch is a whole number; with --rows N, max_steps is written.")
        recipe.changed.append(
            "epoch: TRL leaves out what does not fill the last step of an epoch; here the next one continues there."
        )
    if run.updates_per_step > 1:
        recipe.changed.append(
            f"max_steps, save_steps, eval_steps count steps of {run.updates_per_step} updates; TRL counts updates."
        )
    return run


def evaluation(recipe: Recipe, run: Run) -> None:
    """Write eval_data, eval_split, eval_steps, eval_generations."""
    strategy = recipe.get("eval_strategy") or recipe.get("evaluation_strategy") or "no"  # YAML reads no as false
    recipe.get("do_eval")
    every = recipe.number("eval_steps", 0) or recipe.number("logging_steps", 10)
    split = recipe.get("dataset_test_split", "test")
    samples = recipe.number("num_generations_eval", recipe.settings["num_generations"], whole=True)
    if strategy == "no":
        return
    steps = run.steps_per_epoch if strategy == "epoch" else run.interval(every)
    if steps is None:
        recipe.lose(
            next(filter(recipe.has, EVALUATES)) if strategy == "epoch" else "eval_steps",
            "With --rows N, eval_steps is written.",
        )
    else:
        recipe.put("eval_steps", int(steps), *EVALUATES)
    if recipe.has("test_split_size"):
        return
    if not recipe.has("dataset_name"):
        recipe.missing.append("eval_data: the recipe evaluates and has no dataset_name.")
        return
    recipe.put("eval_data", recipe.get("dataset_name"), *EVALUATES)
    recipe.put("eval_split", split, *EVALUATES)
    recipe.put("eval_generations", samples, *EVALUATES)


def saving(recipe: Recipe, run: Run) -> None:
    """Write save_steps, resume, push_to_hub."""
    strategy = recipe.get("save_strategy", "steps") or "no"  # YAML reads no as false
    every = recipe.number("save_steps", 500)
    if strategy == "no":
        recipe.put("save_steps", 0, "save_strategy")
    elif strategy in ("steps", "epoch"):
        steps = run.steps_per_epoch if strategy == "epoch" else run.interval(every)
        if steps is None:
            recipe.lose("save_strategy" if strategy == "epoch" else "save_steps", "With --rows N, it is computed.")
        else:
            recipe.put("save_steps", int(steps), "save_steps", "save_strategy")
    else:
        recipe.lose("save_strategy", "save_steps is left as it is.")
    resumed = recipe.get("resume_from_checkpoint")
    if resumed and str(resumed).lower() != "false":
        recipe.put("resume", "must", "resume_from_checkpoint")
        if str(resumed).lower() != "true":
            recipe.lose("resume_from_checkpoint", "The newest checkpoint of output_dir is taken.")
    name = recipe.get("hub_model_id")
    if recipe.flag("push_to_hub"):
        if isinstance(name, str) and "/" in name:
            recipe.put("push_to_hub", name, "push_to_hub")
        else:
            recipe.lose("push_to_hub", f"Say push_to_hub: user/{name or 'name'}.")


def reference(recipe: Recipe, run: Run) -> None:
    """Write reference_sync_steps, reference_mixup."""
    every = recipe.number("ref_model_sync_steps", 512)
    mixup = recipe.number("ref_model_mixup_alpha", 0.6)
    if not recipe.flag("sync_ref_model"):
        return
    if not recipe.settings.get("beta") or recipe.settings.get("lora_r"):
        recipe.lose("sync_ref_model", "It needs beta above 0 and no adapter, in TRL too.")
        return
    recipe.put("reference_sync_steps", run.steps(every), "ref_model_sync_steps")
    recipe.put("reference_mixup", mixup, "ref_model_mixup_alpha")


def tracking(recipe: Recipe, run: Run) -> None:
    """Write report_to, log_completions_steps."""
    given = recipe.get("report_to", "none")
    names: list[Any] = given if isinstance(given, list) else [given]
    known = [name for name in names if name in TRACKERS]
    others = [name for name in names if name != "none" and name not in known]
    known = known or (["tensorboard"] if others else ["none"])  # a recipe that names trackers wants curves
    if others:
        recipe.lose("report_to", f"Trackers here are {', '.join(TRACKERS)}; {', '.join(known)} is written.")
    recipe.put("report_to", known if len(known) > 1 else known[0], "report_to")
    if recipe.flag("log_completions"):
        every = run.interval(recipe.number("logging_steps", 10))
        recipe.put("log_completions_steps", every or 1, "log_completions")


def engine(recipe: Recipe) -> None:
    """vLLM: a server of the trainer's own for colocate, a running one for server."""
    if not recipe.flag("use_vllm"):
        return
    recipe.put("rollout_engine", "vllm", "use_vllm")
    recipe.changed.append("rollout_engine: vllm wants bash launch/setup_vllm.sh; native, our default, wants nothing.")
    corrected = recipe.flag("vllm_importance_sampling_correction", True)
    mode = recipe.get("vllm_importance_sampling_mode", "sequence_mask") if corrected else "none"
    recipe.put("sampler_correction", mode, "vllm_importance_sampling_mode")
    if corrected:
        limit = recipe.number("vllm_importance_sampling_clip_max", recipe.number("vllm_importance_sampling_cap", 3.0))
        recipe.put("max_importance_weight", limit, "vllm_importance_sampling_clip_max")
    if str(mode).endswith("mask"):
        recipe.changed.append("sampler_correction: weights below 1 / max_importance_weight are masked too.")
    if recipe.get("vllm_mode", "colocate") == "server":
        host, port = recipe.get("vllm_server_host", "0.0.0.0"), int(recipe.number("vllm_server_port", 8000))
        url = recipe.get("vllm_server_base_url") or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        recipe.put("rollout_server", url, "vllm_mode")
        recipe.put("rollout_timeout_s", recipe.number("vllm_server_timeout", 240.0), "vllm_server_timeout")
        recipe.changed.append("rollout_server: there must run this project's own server, launch/vllm_server.sh.")
        return
    share = recipe.number("vllm_gpu_memory_utilization", 0.3)
    flags = ["--gpu-memory-utilization", f"{share:g}"]
    flags += ["--enable-sleep-mode"] if recipe.flag("vllm_enable_sleep_mode") else []
    recipe.put("vllm_args", flags, "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode")
