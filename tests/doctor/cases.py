"""The recorded runs: settings that go wrong in one way each, and which rule finds it.

record.py runs them. Of the two runs of a rule the first was looked at when its threshold was set; the second was not.
"""

from dataclasses import dataclass, field
from typing import Any

REWARDS = "tests/doctor/bad_rewards.py"
RIGHT = {"final_answer_reward": 1.0}


@dataclass(frozen=True)
class Case:
    """A run of train.py."""

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "demo"  # demo; tiny: a random model; real: the package of launch/real_model.sh; taught: demo, trained
    data: str | None = None  # what record.py writes in place of the demo's questions
    ranks: int = 1
    patch: str = ""  # code that breaks something in the process
    config: str | None = None  # a ready configuration; None: demo.yaml


def of(*names: str, **more: float) -> dict[str, float]:
    """Rewards of bad_rewards.py with weight 1, or with the weights given by name."""
    return {f"{REWARDS}:{name}": weight for name, weight in (dict.fromkeys(names, 1.0) | more).items()}


SMOLLM2 = "configs/smollm2.yaml"
FEW = {"batch_size": 2, "data_rows": 64, "eval_data": None, "log_samples_steps": 2}  # minutes are enough
ENDS = ["a", "e", "o"]  # so that random completions end early
TWICE = {"max_steps": 8, "log_samples_steps": 4, "max_generate_length": 80}
SAMPLER = """
import dataclasses
from grpo.rollout.engine import NativeEngine
generate = NativeEngine.generate
def changed(*args, **named):
    return [dataclasses.replace(one, sampler_logprobs={}) for one in generate(*args, **named)]
NativeEngine.generate = changed
"""
SLOW_RANK = """
import os, time
from grpo.rollout.engine import NativeEngine
generate = NativeEngine.generate
def slow(*args, **named):
    time.sleep(3 * int(os.environ["RANK"]))
    return generate(*args, **named)
NativeEngine.generate = slow
"""
LITTLE_MEMORY = (
    "from types import SimpleNamespace; from tests.faults import wrapping; "
    "wrapping._little_memory_to_{}(SimpleNamespace(value={}))"
)

BAD = {
    "boxed": Case({"rewards": of("boxed")}),
    "tagged": Case({"rewards": RIGHT | of("tagged"), "seed": 3}),
    "large": Case({"rewards": of("right_and_large"), "max_steps": 15}),
    "rare": Case({"rewards": of("rare_letters"), "max_generate_length": 24}, "tiny"),
    "digit": Case({"rewards": of("has_digit")}),
    "anything": Case({"rewards": of("not_empty"), "max_generate_length": 16}, "tiny"),
    "digit_not_large": Case({"rewards": of("has_digit", "right_and_large")}),
    "anything_not_rare": Case({"rewards": of("rare_letters", "not_empty"), "max_generate_length": 16}, "tiny"),
    "cold": Case({"rewards": RIGHT, "temperature": 0.05}),
    "greedy": Case({"rewards": of("coin"), "top_k": 1, "max_generate_length": 12}, "tiny"),
    "two_tokens": Case({"rewards": of("coin"), "max_generate_length": 2}),
    "four_tokens": Case({"max_generate_length": 4, "max_steps": 6, "num_generations": 4} | FEW, "real", config=SMOLLM2),
    "cut_44": Case({"rewards": RIGHT, "max_generate_length": 44}, "taught"),
    "long": Case({"rewards": of(coin=0.1, long=1.0), "lr": 3e-4, "max_steps": 18}),
    "long_tiny": Case({"rewards": of(coin=0.05, long=1.0), "lr": 1e-2, "max_steps": 24, "stop": ENDS}, "tiny"),
    "short": Case(
        {"rewards": {"final_answer_reward": 0.1} | of("short"), "lr": 3e-4, "temperature": 1.3, "max_steps": 18}
    ),
    "ones": Case({"rewards": of("ones"), "lr": 1e-3, "max_steps": 24}),
    "loops": Case({"rewards": of("coin"), "temperature": 0.2, "max_generate_length": 60}, "tiny"),
    "chinese": Case({"rewards": of("coin"), "max_generate_length": 24}, "bilingual"),
    "to_chinese": Case({"rewards": of("han"), "max_generate_length": 16, "lr": 3e-3, "seed": 4}, "bilingual"),
    "fast": Case({"rewards": RIGHT, "lr": 1e-3, "max_steps": 24, "num_generations": 8}),
    "faster": Case({"rewards": RIGHT, "lr": 3e-3, "max_steps": 20, "seed": 2}, "taught"),
    "unlearned": Case(
        {"rewards": RIGHT | of(short=3.0), "lr": 2e-4, "max_steps": 15, "eval_rows": 64, "eval_steps": 5}, "taught"
    ),
    "unlearned_2": Case(
        {"rewards": RIGHT | of(short=3.0), "lora_r": 8, "lr": 3e-3, "max_steps": 20, "seed": 7}, "taught"
    ),
    "fails": Case({"rewards": of("fails_for_some"), "max_reward_failures": 1.0}),
    "late": Case({"rewards": of("late_for_some"), "max_reward_failures": 1.0, "reward_timeout_s": 0.3}),
    "always_fails": Case({"rewards": of("always_fails")}),
    "none": Case({"rewards": of("never_applies"), "max_steps": 5}),
    "seldom": Case({"rewards": of("seldom_applies")}),
    "nan": Case({"rewards": RIGHT, "lr": 1e38}),
    "nan_surrogate": Case({"rewards": RIGHT, "surrogate": "tests/doctor/bad_surrogate.py:sometimes_nan"}),
    "trap": Case({"rewards": of("trap"), "lr": 3e-4, "max_steps": 24, "num_generations": 8}),
    "bonus": Case({"rewards": RIGHT, "entropy_coef": 1.0, "lr": 3e-4, "max_steps": 18}, "taught"),
    "iterations": Case({"rewards": of("long"), "num_iterations": 8, "lr": 5e-4}),
    "minibatches": Case({"rewards": of("short"), "num_minibatches": 4, "num_iterations": 3, "lr": 1e-3, "seed": 6}),
    "thousand": Case({"rewards": of("thousand"), "scale_rewards": "none"}),
    "low_norm": Case({"rewards": RIGHT, "max_grad_norm": 0.02, "seed": 8}),
    "flat": Case({"rewards": of("coin"), "lr": 1e-6, "max_steps": 15}),
    "slow_rate": Case({"rewards": RIGHT, "lr": 1e-9, "max_steps": 20, "num_generations": 8}),
    "other_sampler": Case(
        {"rewards": of("coin"), "max_generate_length": 16}, "tiny", patch=SAMPLER.format("one.sampler_logprobs * 1.1")
    ),
    "leak": Case({"rewards": RIGHT, "eval_data": "demo/train.jsonl", "eval_rows": 32, "eval_split": "train"}),
    "leak_half": Case({"rewards": RIGHT, "eval_data": "@half_of_train", "max_steps": 5}),
    "twice": Case({"rewards": RIGHT}, data="twice"),
    "some_twice": Case({"rewards": RIGHT, "max_steps": 16, "log_samples_steps": 1}, data="some_twice"),
    "two_golds": Case({"rewards": RIGHT, "log_samples_steps": 1}, data="two_golds"),
    "some_two_golds": Case({"rewards": RIGHT, "max_steps": 16, "log_samples_steps": 1}, data="some_two_golds"),
    "long_prompts": Case({"rewards": RIGHT, "max_prompt_length": 35}),
    "longer_prompts": Case({"rewards": of("coin"), "max_prompt_length": 78, "max_generate_length": 8}, "tiny"),
    "slow": Case({"rewards": of("slow"), "reward_workers": 1}),
    "busy": Case({"rewards": of("busy"), "reward_workers": 0, "seed": 11}),
    "tail": Case({"rewards": of("coin"), "batch_size": 16, "num_generations": 8, "stop": ENDS} | TWICE, "tiny"),
    "tail_2": Case({"rewards": of("coin"), "batch_size": 24, "stop": ["n", "s", " "], "seed": 13} | TWICE, "sharp"),
    "saves": Case({"rewards": RIGHT, "save_steps": 1, "save_in_background": False}),
    "saves_2": Case({"rewards": of("coin"), "save_steps": 2, "save_in_background": False, "max_generate_length": 8}),
    "idle": Case({"rewards": of("longest"), "batch_size": 1, "num_generations": 6}, ranks=2),
    "idle_2": Case({"rewards": RIGHT, "rollout_chunk_rows": 8, "max_steps": 8}, ranks=2, patch=SLOW_RANK),
    "cut_40": Case({"rewards": RIGHT, "max_generate_length": 40, "seed": 21, "lora_r": 8, "lr": 1e-3}, "taught"),
    "coarse_sampler": Case(
        {"rewards": of("coin"), "max_generate_length": 12, "seed": 22},
        "tiny",
        patch=SAMPLER.format("(one.sampler_logprobs * 4).round() / 4"),
    ),
    "trap_tiny": Case({"rewards": of("trap"), "lr": 1e-2, "max_steps": 48, "stop": ENDS, "seed": 23}, "tiny"),
    "memory": Case({"rewards": RIGHT}, patch=LITTLE_MEMORY.format("sample", 5)),
    "memory_2": Case({"rewards": RIGHT, "seed": 12}, patch=LITTLE_MEMORY.format("train", 3)),
}

TRIGGERS = {  # rule: the run its threshold was set by, and one that was not
    "stopped": ("nan", "always_fails"),
    "skipped_updates": ("nan", "nan_surrogate"),
    "no_reward": ("none", "seldom"),
    "reward_failures": ("fails", "late"),
    "never_given": ("boxed", "tagged"),
    "too_hard": ("large", "rare"),
    "too_easy": ("digit", "anything"),
    "one_sided": ("digit_not_large", "anything_not_rare"),
    "identical_completions": ("cold", "greedy"),
    "never_ends": ("two_tokens", "four_tokens"),
    "truncated": ("cut_44", "cut_40"),
    "length_explosion": ("long", "long_tiny"),
    "length_collapse": ("short", "unlearned"),
    "repetition": ("ones", "loops"),
    "language_switching": ("chinese", "to_chinese"),
    "reward_fell": ("fast", "faster"),
    "held_out_fell": ("unlearned", "unlearned_2"),
    "entropy_collapse": ("trap", "trap_tiny"),
    "entropy_explosion": ("bonus", "fast"),
    "clip_share": ("iterations", "minibatches"),
    "grad_norm": ("thousand", "low_norm"),
    "reward_flat": ("flat", "slow_rate"),
    "sampler_gap": ("other_sampler", "coarse_sampler"),
    "held_out_leak": ("leak", "leak_half"),
    "duplicates": ("twice", "some_twice"),
    "gold_differs": ("two_golds", "some_two_golds"),
    "left_out": ("long_prompts", "longer_prompts"),
    "slow_rewards": ("slow", "busy"),
    "long_tail": ("tail", "tail_2"),
    "slow_saves": ("saves", "saves_2"),
    "idle_ranks": ("idle", "idle_2"),
    "out_of_memory": ("memory", "memory_2"),
}

HEALTHY = {
    "demo": Case(
        {
            "batch_size": 8,
            "num_generations": 8,
            "max_steps": 60,
            "lr_schedule": "linear",
            "log_samples_steps": 10,
            "eval_data": "demo/test.jsonl",
        },
        ranks=2,
    ),
    "real": Case({"log_samples_steps": 6}, "real", config=SMOLLM2),
    "two_rewards": Case(
        {
            "rewards": {"final_answer_reward": 1.0, **of(has_digit=0.2)},
            "num_iterations": 2,
            "max_steps": 40,
            "num_generations": 8,
            "seed": 3,
        }
    ),
}
