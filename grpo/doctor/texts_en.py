"""The findings in English: for each rule what is wrong, the evidence, and what to change.

Names in braces are values of the rule's `Evidence`; a value that is not known is shown as a dash.
"""

RULES: dict[str, tuple[str, str, str]] = {
    "stopped": (
        "The run ended with an error",
        "exit code {code} after {steps} logged steps: {reason}",
        "Do what the line says, then give the same command again: it continues from the newest checkpoint. "
        "docs/running.md explains the codes.",
    ),
    "skipped_updates": (
        "Updates were skipped because a number was not finite",
        "{count} updates had NaN or Inf in {steps} steps, the first in step {at}; the largest lr was {lr:g}.",
        "Look at what python -m grpo.replay prints for the folders in output_dir/anomalies. Usual causes: lr is too "
        "high (divide it by 10), or dtype bf16 with a model that needs fp32.",
    ),
    "no_reward": (
        "Completions have no reward at all",
        "In {count} of {steps} steps every reward function gave None for every completion, so nothing was learned.",
        "Look at rewards and at the columns that the functions read: None means that a function does not apply or "
        "failed. Lines on stderr name the failures.",
    ),
    "reward_failures": (
        "A reward function fails or is too slow",
        "{name} failed for {share:.1%} of the completions ({late:.1%} exceeded the time limit); {calls} calls failed "
        "in all. A failed call counts as no reward.",
        "Correct the function: stderr has the errors. For time limits raise reward_timeout_s or reward_workers.",
    ),
    "never_given": (
        "A reward was never given",
        "{name} was {score:g} for every completion of {steps} steps, so it had no part in any gradient.",
        "If the completion above deserves a reward, correct the function {name} in rewards, or the prompt "
        "(system_prompt, prompt_template, example_answer) that should make the model write what it reads. If it does "
        "not, the task is too hard to start with: train on worked solutions first (python -m grpo.sft), begin with "
        "easier questions, or add a reward for parts of the way.",
    ),
    "too_hard": (
        "The task is too hard: in most groups no completion is rewarded",
        "In steps {begin} to {end} {share:.0%} of the groups had no variance, and the mean reward was {mean:.3g} "
        "(rewards go from {low:g} to {high:g}). A group without variance has no gradient.",
        "Raise num_generations, so that more groups have a completion that is right; begin with easier questions "
        "(difficulty_range), or train on worked solutions first (python -m grpo.sft). filter_groups: resample draws "
        "other groups in place of these.",
    ),
    "too_easy": (
        "The task is too easy: from the start nearly every completion is rewarded",
        "In the first {steps} steps {share:.0%} of the groups had no variance, and the mean reward was {mean:.3g} of "
        "{high:g}. There is little left to learn.",
        "Use harder questions, or drop those that are always solved: difficulty_range, or filter_groups: resample. A "
        "reward that is never missed may also be too generous: read a few completions that got it.",
    ),
    "one_sided": (
        "One reward is learned and another is not",
        "In steps {begin} to {end} {given} had a mean of {got:.3g} and hardly anything left to gain, while {other} "
        "stayed at {left:.3g}. Often that is the format without the task.",
        "Give {other} more weight in rewards, or less to {given}; make {other} reachable (easier questions, partial "
        "credit, num_generations). Check on the completion above that {other} reads what the model writes.",
    ),
    "identical_completions": (
        "The completions of a group are all the same",
        "In steps {begin} to {end} {share:.0%} of {groups} logged groups consist of one text, at temperature "
        "{temperature} and an entropy of {entropy:.3g} nats. Equal completions have equal rewards, and no gradient.",
        "Raise temperature (1.0 is usual), and turn top_k, top_p and min_p off. If the model became so during "
        "training, set entropy_coef or lower lr.",
    ),
    "never_ends": (
        "No completion ends by itself",
        "{share:.0%} of the completions in {steps} steps were cut at {limit} tokens.",
        "If the completion above was complete long before its end, the model does not write an end token: set stop, "
        "or chat_template for a chat model. A base model learns to end by python -m grpo.sft. If it was not, raise "
        "max_generate_length.",
    ),
    "truncated": (
        "Many completions are cut at the limit, and it costs them their reward",
        "In steps {begin} to {end} {share:.0%} of the completions were cut at {limit} tokens. Mean reward of those "
        "that were cut: {cut:.3g}; of those that ended: {ended:.3g}.",
        "Raise max_generate_length, or ask for shorter answers in the prompt. truncated: mask leaves cut completions "
        "out of the loss.",
    ),
    "length_explosion": (
        "Completions become longer without becoming better",
        "Mean length grew from {first:.1f} to {last:.1f} tokens, while {name} went from {before:.3g} to {after:.3g}.",
        "Look at the completion above for padding. Lower the weight of what rewards length in rewards; weighting: "
        "dapo or dr_grpo does not favour long wrong answers as grpo does; lower lr.",
    ),
    "length_collapse": (
        "Completions become so short that the task suffers",
        "Mean length fell from {first:.1f} to {last:.1f} tokens, while {name} went from {before:.3g} to {after:.3g}.",
        "Lower the weight of what rewards short answers in rewards; lower lr; set beta above 0, which keeps the model "
        "near its start.",
    ),
    "repetition": (
        "The model repeats itself",
        "In steps {begin} to {end} at least half of the text is repetition in {share:.0%} of {rows} logged "
        "completions.",
        "Lower lr, or set beta above 0. At the start of a run: temperature may be too low, or the prompt lacks the "
        "chat template (chat_template). If repeating is rewarded, correct the reward.",
    ),
    "language_switching": (
        "The model answers in another script than it is asked in",
        "In steps {begin} to {end} {share:.0%} of {rows} logged completions are to a large part {script}; their "
        "questions are {asked}.",
        "Ask for the language in system_prompt, or add a reward for it to rewards. With beta above 0 the model drifts "
        "less from the language it started with.",
    ),
    "reward_fell": (
        "The reward was lost again",
        "The mean reward was {peak:.3g} around step {at} and {last:.3g} at the end. lr was at most {lr:g}, the mean "
        "gradient norm {norm:.3g} (max_grad_norm {max_norm}).",
        "Lower lr to a half or a fifth, use warmup_ratio and lr_schedule: cosine, or set beta above 0. Continue from "
        "the checkpoint before the fall: output_dir/best.json names the best one.",
    ),
    "held_out_fell": (
        "Held-out accuracy falls while the reward rises",
        "{name} was {best:.1%} after step {at} and is {last:.1%} at the end, while the reward in training went from "
        "{before:.3g} to {after:.3g}.",
        "The model learns what the reward counts and not the task, or its training questions by heart: read its "
        "completions, correct the reward, use more questions or fewer epochs (epoch). output_dir/best.json names the "
        "best checkpoint.",
    ),
    "entropy_collapse": (
        "The model stopped exploring before it solved the task",
        "The entropy fell from {first:.3g} to {last:.3g} nats; in steps {begin} to {end} {zero:.0%} of the groups had "
        "no variance, at a mean reward of {mean:.3g}.",
        "Set entropy_coef (0.001 to 0.01) or entropy_target, raise clip_eps_high (0.28), raise temperature, or lower "
        "lr (now {lr:g}).",
    ),
    "entropy_explosion": (
        "The model's output becomes random",
        "The entropy grew from {first:.3g} to {last:.3g} nats while the mean reward fell from {before:.3g} to "
        "{after:.3g}. lr was at most {lr:g}, entropy_coef {bonus}.",
        "Lower lr, and entropy_coef where it is set. Continue from a checkpoint before the fall.",
    ),
    "clip_share": (
        "The policy moves too far within one step",
        "The clip stopped the gradient of {share:.0%} of the trained tokens, on average over the run (clip_eps {eps}, "
        "{updates} updates a step, lr {lr:g}, KL to the sampling policy {kl:.3g}).",
        "Lower lr, num_iterations or num_minibatches.",
    ),
    "grad_norm": (
        "Gradients are far above the clip",
        "The median gradient norm was {norm:.3g} in steps {begin} to {end} ({first:.3g} in the first third), and "
        "max_grad_norm is {limit}: the clip alone decides the size of the updates.",
        "Lower lr if the reward falls or jumps. Otherwise check the scale of the rewards (scale_rewards: group) and "
        "dtype.",
    ),
    "reward_flat": (
        "The reward does not rise",
        "It was {first:.3g} in the first third of {steps} steps and {last:.3g} in the last ({z:+.1f} standard errors), "
        "although groups have variance. lr was at most {lr:g}; the clip acted on {clip:.1%} of the tokens.",
        "If completions at the end read like those at the start, raise lr three to ten times, or train longer (epoch, "
        "max_steps). If they differ, the reward does not say which are better: check it on a few completions.",
    ),
    "sampler_gap": (
        "Sampler and trainer disagree about probabilities",
        "Their log-probs of the same tokens differ by {gap:.3g} on average and {largest:.3g} at most; effective sample "
        "size {ess:.0%}; the correction changed {corrected:.1%} of the tokens (dtype {dtype}).",
        "Use dtype: fp32 if memory allows. sampler_correction and max_importance_weight decide what the correction "
        "does; off_policy_threshold leaves out the worst rows.",
    ),
    "held_out_leak": (
        "Held-out questions are trained on too",
        "{shared} of the {total} questions of {file} are in the training data ({share:.0%}).",
        "Remove them from data, or take eval_data from elsewhere; eval_split_size holds a part of data out. Until then "
        "the held-out accuracy is not that of new questions.",
    ),
    "duplicates": (
        "Questions occur several times in the data",
        "Of {groups} logged groups of the first epoch {again} repeat an earlier question; one occurs {times} times: "
        "{question}",
        "Remove repeated rows from data. Repeated questions weigh more, and may be held out and trained on at once.",
    ),
    "gold_differs": (
        "The same question has different gold answers",
        "{count} of {questions} logged questions; one of them: {question} (gold answers: {golds})",
        "Correct or remove these rows of data, or put what tells them apart into prompt_template. A completion cannot "
        "be right for both.",
    ),
    "left_out": (
        "Many questions are left out because their prompts are too long",
        "{dropped} questions ({share:.0%}) were dropped, {kept} kept; max_prompt_length is {limit}.",
        "Raise max_prompt_length.",
    ),
    "slow_rewards": (
        "Training waits for reward functions",
        "{share:.0%} of the time: {seconds:.2f} s of a step of {step:.2f} s, with {workers} reward_workers a process.",
        "Raise reward_workers up to the number of free cores; make the function faster, or async where it waits for "
        "a server.",
    ),
    "long_tail": (
        "A few long completions keep the rollout waiting",
        "Sampling takes {share:.0%} of the time, and the longest completion of a step has {longest:.0f} tokens where "
        "the mean is {mean:.0f}.",
        "Set rollout_tokens with a larger rollout_chunk_rows, so that waiting rows take the place of finished ones; "
        "lower max_generate_length if the longest completions are not rewarded.",
    ),
    "slow_saves": (
        "Training waits for checkpoints",
        "{waited:.1f} s of saves for {total:.1f} s of steps ({share:.0%}); save_steps is {every}.",
        "Raise save_steps, set save_in_background: true, or write output_dir to a faster disk.",
    ),
    "idle_ranks": (
        "Processes wait for the slowest one",
        "In {phase} ({share:.0%} of the time) the average process waits for {idle:.0%} of it.",
        "Lower rollout_chunk_rows (rollout) or micro_batch_tokens (micro_batches), so that there are more pieces than "
        "processes; raise batch_size; see that no process shares its cores or GPU with other work.",
    ),
    "out_of_memory": (
        "Memory ran out, and work was done in halves",
        "{rollout} chunks of rollouts and {update} micro-batches were halved. What is trained is the same, but time "
        "was lost.",
        "Lower rollout_chunk_rows or micro_batch_tokens to what fits; python -m grpo.plan computes it.",
    ),
}

WHY = {
    "empty": "it is empty",
    "other_answer": "its answer {extracted} is not the gold answer {gold}",
    "cut": "it was cut at the limit before an answer",
    "not_where_read": "it contains the gold answer {gold}, but the reward looks elsewhere, or wants more",
    "no_marks": "the marks around an answer, which the reward or the prompt names, are missing",
    "no_gold": "the gold answer {gold} is not in it",
}

LABELS = {
    "run": "run {name}: {steps} steps, {rows} logged completions",
    "unreadable": "{count} lines could not be read and are left out",
    "no_config": "the settings of the run are not known: limits are estimated from its metrics",
    "few": "only {steps} steps are logged: most rules need 4 to 12",
    "none": "no findings",
    "evidence": "Evidence",
    "change": "Change",
    "example": "Completion of step {step}, reward {reward}",
    "question": "question",
    "completion": "completion",
    "gold": "gold answer",
    "extracted": "extracted",
    "why": "why no reward",
    "nothing": "none",
    "short": "doctor: {count} findings, first: {what}. All: python -m grpo.doctor {folder}",
    "short_one": "doctor: {what}. More: python -m grpo.doctor {folder}",
}
