"""GRPO, one step after the other.

    torchrun --standalone --nproc_per_node=2 train.py [--config file.yaml] [--key value ...]

Without --config, --model or --data this runs the demo. `--help` lists the settings, README.md explains them,
grpo/__init__.py is the map of the parts.
"""

import sys

from grpo.batching import deliver, make_plan
from grpo.command_line import load_config
from grpo.config import Config, prompts_per_step, total_steps, updates_per_step
from grpo.console import warn
from grpo.data import load_questions
from grpo.distributed import World
from grpo.evaluate import evaluate
from grpo.launch import run_main
from grpo.models import check_lengths, load_tokenizer, stop_token_ids
from grpo.policy import load_policy, load_rollout_model
from grpo.prompts import keep_questions, make_recipe
from grpo.resume import restore
from grpo.rewards import load_rewards
from grpo.rollout import cut_chunks, rollout
from grpo.rollout.native import NativeEngine
from grpo.run import Run
from grpo.scoring import advantages_of, gather, rollout_metrics, score


def train(cfg: Config, world: World) -> None:
    """Assemble the parts, then one loop. P prompts a step, G completions of each, N = P*G rows."""
    assert cfg.model is not None
    run = Run(cfg, world)
    tokenizer = load_tokenizer(cfg.model)
    recipe = make_recipe(cfg, tokenizer)
    questions = load_questions(cfg, recipe, tokenizer)
    held_out = load_questions(cfg, recipe, tokenizer, held_out=True) if cfg.eval_data else None
    recipe = keep_questions(recipe, (held_out or questions).first_questions(4))
    rewards = load_rewards(cfg)
    run.identify(questions, rewards, tokenizer)  # and make sure that all ranks mean the same run
    resumed = run.resume_point()  # a checkpoint folder, or None
    policy = load_policy(cfg, world, resumed)  # the trained model, its optimizer, its reference
    check_lengths(policy.model, cfg.max_prompt_length, cfg.max_generate_length)
    stop_ids = stop_token_ids(policy.model, tokenizer)
    engine = NativeEngine(load_rollout_model(policy), stop_ids, cfg.max_generate_length, cfg.seed, cfg.dtype)

    P, G = prompts_per_step(cfg), cfg.num_generations
    total = total_steps(cfg, len(questions.items))
    as_messages = cfg.reward_inputs == "messages"
    run.describe(questions, total, policy, len(cut_chunks(P, G, cfg.rollout_chunk_rows)))
    first = restore(policy, resumed)

    def held_out_accuracy(step: int) -> None:
        if held_out is not None:
            engine.load_weights(policy.weights())
            run.log_eval(step, evaluate(engine, held_out, rewards, tokenizer, cfg, world, warn))

    with run.logging(total, first):
        if first == 0:
            held_out_accuracy(0)
        for step in range(first, total):
            tally = run.tally(step + 1)

            with tally.phase("rollout"):
                prompts = questions.prompts(step, P)
                engine.load_weights(policy.weights())
                completions = rollout(engine, prompts, step, cfg, world)  # this rank's share of the N

            with tally.phase("reward"):
                scored = score(rewards, prompts, completions, G, tokenizer, as_messages, warn)

            with tally.phase("exchange"):
                table = gather(world, cfg, rewards, scored)  # [N] rewards and lengths, the same on every rank
                advantages = advantages_of(table, cfg)  # [N], over whole groups
                plan = make_plan(cfg, prompts, table.lengths, advantages, world.size)
                batches = deliver(world, cfg, plan, prompts, completions, table, advantages, policy.even_block)

            with tally.phase("logprobs"):
                batches = policy.annotate(batches)  # + old and reference log-probs

            with tally.phase("update"):
                total_updates = total * updates_per_step(cfg)
                norms = policy.train_on(batches, tally, total_updates, table.any_broken, on_skip=run.quarantine)

            metrics = run.log_step(
                step + 1, total, rollout_metrics(table, advantages, policy.vocab_size), tally, norms, policy
            )
            run.log_samples(step + 1, scored)
            policy.trust(metrics)
            policy.counters.step = step + 1
            if cfg.eval_steps and (step + 1) % cfg.eval_steps == 0 and step + 1 < total:
                held_out_accuracy(step + 1)
            if run.due(step + 1, total):
                run.save(step + 1, policy, tokenizer, recipe)
        if first < total:
            held_out_accuracy(total)
    run.finish(first, total)


if __name__ == "__main__":
    sys.exit(run_main(train, load_config, sys.argv[1:]))
