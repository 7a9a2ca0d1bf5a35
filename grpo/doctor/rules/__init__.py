"""The rules, by theme: each is a function of a `Recording` that returns its evidence, or None.

In: a `Recording`. Out: an `Evidence`, or None. A threshold stands beside its rule, as a constant with the reason.
"""

from grpo.doctor.findings import Rule
from grpo.doctor.rules import completions, data, ending, rewards, speed, updates

RULES: dict[str, Rule] = {  # in the order in which findings are listed: what stops learning first
    "stopped": ending.stopped,
    "skipped_updates": updates.skipped_updates,
    "no_reward": rewards.no_reward,
    "reward_failures": rewards.reward_failures,
    "never_given": rewards.never_given,
    "too_hard": rewards.too_hard,
    "too_easy": rewards.too_easy,
    "one_sided": rewards.one_sided,
    "identical_completions": completions.identical_completions,
    "never_ends": completions.never_ends,
    "truncated": completions.truncated,
    "length_explosion": completions.length_explosion,
    "length_collapse": completions.length_collapse,
    "repetition": completions.repetition,
    "language_switching": completions.language_switching,
    "reward_fell": rewards.reward_fell,
    "held_out_fell": rewards.held_out_fell,
    "entropy_collapse": updates.entropy_collapse,
    "entropy_explosion": updates.entropy_explosion,
    "clip_share": updates.clip_share,
    "grad_norm": updates.grad_norm,
    "reward_flat": rewards.reward_flat,
    "sampler_gap": updates.sampler_gap,
    "held_out_leak": data.held_out_leak,
    "duplicates": data.duplicates,
    "gold_differs": data.gold_differs,
    "left_out": data.left_out,
    "slow_rewards": speed.slow_rewards,
    "long_tail": speed.long_tail,
    "slow_saves": speed.slow_saves,
    "idle_ranks": speed.idle_ranks,
    "out_of_memory": speed.out_of_memory,
}
