"""The loop of supervised training before GRPO: the completions are given, nothing is sampled or rewarded.

    torchrun --standalone --nproc_per_node=2 -m grpo.sft --config file.yaml [--key value ...]

The file's `sft:` section is laid over its other settings (grpo/config/sft_section.py); `--help` lists them all. Then
`train.py --config file.yaml --model output_sft/checkpoint_N` goes on with GRPO, and launch/sft_then_grpo.sh does both.
"""

from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from grpo.checkpoints.resume import restore
from grpo.config.held_out import eval_tag
from grpo.config.settings import Config, prompts_per_step, total_steps
from grpo.errors import warn
from grpo.evaluate.held_out import evaluate_sets
from grpo.models.checks import check_lengths, check_vocabulary, stop_token_ids
from grpo.rewards.pool import open_rewards
from grpo.rollout.engine import NativeEngine
from grpo.run.run import Run
from grpo.run.task import load_task
from grpo.runtime.distributed import World
from grpo.sft.policy import SftPolicy, sft_batches
from grpo.sft.texts import load_texts, solutions_sha256
from grpo.training.load_policy import load_policy, load_rollout_model
from grpo.types import Notices


def train_sft(cfg: Config, world: World) -> None:
    """Assemble the parts, then one loop over steps of P texts."""
    run = Run(cfg, world)
    task = load_task(cfg, run.kept())
    tokenizer, recipe, held_out = task.tokenizer, task.recipe, task.held_out
    run.identify(task.questions, [], tokenizer, solutions=solutions_sha256(task.questions))
    resumed = run.resume_point()  # a checkpoint folder, or None
    policy = load_policy(cfg, world, resumed, SftPolicy)
    assert isinstance(policy, SftPolicy)
    check_lengths(policy.model, cfg.max_prompt_length, cfg.max_generate_length)
    num_tokens = check_vocabulary(policy.model, tokenizer, recipe.rules)
    stop_ids = stop_token_ids(policy.model, tokenizer, recipe.end_of_turn, run.log.write_line)
    texts = load_texts(cfg, recipe, tokenizer, task.questions, stop_ids)
    held_out_texts = {name: load_texts(cfg, recipe, tokenizer, one, stop_ids) for name, one in held_out.items()}

    P = prompts_per_step(cfg)
    total = total_steps(cfg, len(texts.questions.items))
    first = restore(policy, resumed)
    run.log.describe_parts(texts.questions, held_out, policy, f"{total} steps of {P} texts", total)

    with ExitStack() as open_parts:
        grade_answers = None  # greedy accuracy on held-out questions, if there are rewards to score it
        if held_out and cfg.rewards:
            rewards = open_parts.enter_context(closing(open_rewards(cfg, warn if world.is_main else lambda _: None)))
            engine = NativeEngine.of(cfg, load_rollout_model(policy), stop_ids, num_tokens, tokenizer)
            grade_answers = partial(
                evaluate_sets, engine, task, rewards, cfg, world, warn, run.pulse, run.log.log_answers
            )

        def evaluate(step: int) -> dict[str, float] | None:
            metrics: dict[str, float] = {}
            for name, held_out_part in held_out_texts.items():
                of_set = policy.measure(held_out_part.all())
                metrics |= {eval_tag(name, metric): value for metric, value in of_set.items()}
            if grade_answers is not None:
                engine.load_weights(policy.weights)
                rewards.at(step, total)
                accuracy_metrics = grade_answers()
                return None if accuracy_metrics is None else metrics | accuracy_metrics
            return metrics

        open_parts.enter_context(run.training(total, first, policy, tokenizer, recipe))
        for step in range(first, total):
            run.evaluate_if_due(step, first, total, evaluate)
            tally = run.tally(step + 1)

            with tally.phase("exchange"):
                run.act_on_notices(Notices(world.gather_rows(np.array(run.notices(policy, step), dtype=np.float64))))
                rows = texts.of_step(step, P)
                batches = [sft_batches(cfg, world, rows, policy.even_block)]

            with tally.phase("update"):
                norms = policy.train_on(batches, tally, total, False, partial(run.quarantine, ((), ())))

            run.log.log_sft_step(
                step + 1, total, sum(len(row.token_ids) for row in rows), tally.reduce(world), norms, policy
            )
            policy.counters.step = step + 1
            run.save_if_due(step + 1, total)
        run.evaluate_if_due(total, first, total, evaluate)
    run.finish(first, total)
