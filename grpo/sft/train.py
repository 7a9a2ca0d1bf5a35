"""Supervised training before GRPO, one step after the other: what to say is given, nothing is sampled or rewarded.

    torchrun --standalone --nproc_per_node=2 -m grpo.sft --config file.yaml [--key value ...]

The file's `sft:` section is laid over its other settings (grpo/config/sft_section.py); `--help` lists them all. Then
`train.py --config file.yaml --model output_sft/checkpoint_N` goes on with GRPO, and launch/sft_then_grpo.sh does both.
"""

from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from grpo.checkpoints.resume import restore
from grpo.config.settings import Config, prompts_per_step, total_steps
from grpo.data.questions import load_questions
from grpo.data.recipe import keep_questions, make_recipe
from grpo.errors import warn
from grpo.evaluate.held_out import evaluate
from grpo.models.checks import check_lengths, check_vocabulary, stop_token_ids
from grpo.models.loading import load_tokenizer
from grpo.rewards.pool import open_rewards
from grpo.rollout.engine import NativeEngine
from grpo.run.run import Run
from grpo.runtime.distributed import World
from grpo.sft.policy import SftPolicy, sft_batches
from grpo.sft.texts import load_texts, solutions_sha256
from grpo.training.policy import load_policy, load_rollout_model
from grpo.types import Notices


def train_sft(cfg: Config, world: World) -> None:
    """Assemble the parts, then one loop over steps of P texts."""
    assert cfg.model is not None
    run = Run(cfg, world)
    tokenizer = load_tokenizer(cfg.model)
    recipe = make_recipe(cfg, tokenizer)
    questions = load_questions(cfg, recipe, tokenizer)
    held_out = load_questions(cfg, recipe, tokenizer, held_out=True) if cfg.eval_data or cfg.eval_split_size else None
    recipe = keep_questions(recipe, (held_out or questions).first_questions(4))
    run.identify(questions, [], tokenizer, solutions=solutions_sha256(questions))
    resumed = run.resume_point()  # a checkpoint folder, or None
    policy = load_policy(cfg, world, resumed, SftPolicy)
    assert isinstance(policy, SftPolicy)
    check_lengths(policy.model, cfg.max_prompt_length, cfg.max_generate_length)
    check_vocabulary(policy.model, tokenizer)
    stop_ids = stop_token_ids(policy.model, tokenizer)
    lessons = load_texts(cfg, recipe, tokenizer, questions, stop_ids)
    held_out_texts = load_texts(cfg, recipe, tokenizer, held_out, stop_ids) if held_out else None

    P = prompts_per_step(cfg)
    total = total_steps(cfg, len(lessons.questions.items))
    first = restore(policy, resumed)
    run.log.describe_parts(lessons.questions, policy, f"{total} steps of {P} texts")

    with ExitStack() as parts:
        answered = None  # greedy accuracy on held-out questions, where there are rewards to judge it
        if held_out is not None and cfg.rewards:
            rewards = parts.enter_context(closing(open_rewards(cfg, warn if world.is_main else lambda _: None)))
            engine = NativeEngine.of(cfg, load_rollout_model(policy), stop_ids)
            answered = partial(evaluate, engine, held_out, rewards, tokenizer, cfg, world, warn, pulse=run.pulse)

        def evaluate_if_due(step: int) -> None:
            due = step in (0, total) or (cfg.eval_steps and step % cfg.eval_steps == 0)
            if held_out_texts is None or not due or (step == first and run.log.evaluated(step)):
                return
            run.heartbeat(step, "eval")
            metrics = policy.measure(held_out_texts.all())
            if answered is not None:
                engine.load_weights(policy.weights())
                answers = answered()
                if answers is None:
                    run.preempt()
                metrics |= answers
            run.log.log_eval(step, metrics)

        parts.enter_context(run.training(total, first, policy, tokenizer, recipe))
        for step in range(first, total):
            evaluate_if_due(step)
            tally = run.tally(step + 1)

            with tally.phase("exchange"):
                run.act_on_notices(Notices(world.gather_rows(np.array(run.notices(policy, step), dtype=np.float64))))
                rows = lessons.of_step(step, P)
                batches = [sft_batches(cfg, world, rows, policy.even_block)]

            with tally.phase("update"):
                norms = policy.train_on(batches, tally, total, False, partial(run.quarantine, ((), ())))

            run.log.log_sft_step(step + 1, total, sum(len(row.token_ids) for row in rows), tally, norms, policy)
            policy.counters.step = step + 1
            if run.due(step + 1, total):
                run.save(last=step + 1 == total)
        evaluate_if_due(total)
    run.finish(first, total)
