"""GRPO, one step after the other.

    torchrun --standalone --nproc_per_node=2 train.py [--config file.yaml] [--key value ...]

Without --config, --model or --data this runs the demo. `--help` lists the settings, README.md explains them,
grpo/__init__.py is the map of the parts.
"""

import sys
from contextlib import closing
from functools import partial

from grpo.config.command_line import load_config, refuse_bad_settings

if __name__ == "__main__":
    refuse_bad_settings(sys.argv[1:])  # before the seconds that the imports below take

from grpo.checkpoints.resume import restore
from grpo.config.settings import Config, prompts_per_step, total_steps, updates_per_step
from grpo.data.questions import load_questions
from grpo.data.recipe import keep_questions, make_recipe
from grpo.errors import warn
from grpo.evaluate.held_out import evaluate
from grpo.models.checks import check_lengths, check_vocabulary, stop_token_ids
from grpo.models.loading import load_tokenizer
from grpo.rewards.pool import open_rewards
from grpo.rollout import cut_chunks, rollout
from grpo.rollout.engine import NativeEngine
from grpo.run.launch import run_main
from grpo.run.run import Run
from grpo.runtime.distributed import World
from grpo.training.exchange import deliver
from grpo.training.minibatches import make_plan
from grpo.training.policy import load_policy, load_rollout_model
from grpo.training.scoring import Scoring, advantages_of, gather


def train(cfg: Config, world: World) -> None:
    """Assemble the parts, then one loop. P prompts a step, G completions of each, N = P*G rows."""
    assert cfg.model is not None
    run = Run(cfg, world)
    tokenizer = load_tokenizer(cfg.model)
    recipe = make_recipe(cfg, tokenizer)
    questions = load_questions(cfg, recipe, tokenizer)
    held_out = load_questions(cfg, recipe, tokenizer, held_out=True) if cfg.eval_data or cfg.eval_split_size else None
    recipe = keep_questions(recipe, (held_out or questions).first_questions(4))
    rewards = open_rewards(cfg, warn if world.is_main else lambda _: None)  # in workers of their own
    run.identify(questions, rewards.rewards, tokenizer)  # and make sure that all ranks mean the same run
    resumed = run.resume_point()  # a checkpoint folder, or None
    policy = load_policy(cfg, world, resumed)  # the trained model, its optimizer, its reference
    check_lengths(policy.model, cfg.max_prompt_length, cfg.max_generate_length)
    check_vocabulary(policy.model, tokenizer)
    engine = NativeEngine.of(cfg, load_rollout_model(policy), stop_token_ids(policy.model, tokenizer))

    P, G, total = prompts_per_step(cfg), cfg.num_generations, total_steps(cfg, len(questions.items))
    first = restore(policy, resumed)
    run.log.describe(questions, total, policy, len(cut_chunks(P, G, cfg.rollout_chunk_rows)))

    def evaluate_if_due(step: int) -> None:
        due = step in (0, total) or (cfg.eval_steps and step % cfg.eval_steps == 0)
        if held_out is None or not due or (step == first and run.log.evaluated(step)):
            return
        run.heartbeat(step, "eval")
        engine.load_weights(policy.weights())
        metrics = evaluate(engine, held_out, rewards, tokenizer, cfg, world, warn, pulse=run.pulse)
        if metrics is None:
            run.preempt()
        run.log.log_eval(step, metrics)

    with closing(rewards), run.training(total, first, policy, tokenizer, recipe):
        for step in range(first, total):
            evaluate_if_due(step)
            tally = run.tally(step + 1)

            with tally.phase("rollout"):
                prompts = questions.prompts(step, P)
                engine.load_weights(policy.weights())
                scoring = Scoring(cfg, rewards, prompts, tokenizer, warn, run.pulse)  # at once, of what is finished
                completions = rollout(engine, prompts, step, cfg, world, scoring.pulse, scoring.take)  # our share of N

            with tally.phase("reward"):
                scored = scoring.finish(completions)  # waits for the scores that are missing

            with tally.phase("exchange"):
                notices = run.notices(policy, step)  # of this rank: asked to stop, memory that failed
                table = gather(world, cfg, rewards.rewards, scored, notices)  # [N], the same on every rank
                run.act_on_notices(table)  # leaves from here when there is reason to
                advantages = advantages_of(table, cfg)  # [N], over whole groups
                plan = make_plan(cfg, prompts, table.lengths, advantages, world.size, policy.scorer.shares)
                batches = deliver(world, cfg, plan, prompts, completions, table, advantages, policy.even_block)

            with tally.phase("logprobs"):
                batches = policy.annotate(batches)  # + old and reference log-probs

            with tally.phase("update"):
                on_skip = partial(run.quarantine, (prompts, completions))
                norms = policy.train_on(batches, tally, total * updates_per_step(cfg), table.any_broken, on_skip)

            metrics = run.log.log_step(step + 1, total, table, advantages, tally, norms, policy, engine)
            run.log.log_samples(step + 1, scored, advantages)
            policy.trust(metrics)
            policy.counters.step = step + 1
            if run.due(step + 1, total):
                run.save(last=step + 1 == total)
        evaluate_if_due(total)
    run.finish(first, total)


if __name__ == "__main__":
    sys.exit(run_main(train, load_config, sys.argv[1:]))
