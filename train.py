"""Train a model with GRPO.

    torchrun --standalone --nproc_per_node=2 train.py [--config file.yaml] [--key value ...]

Without --config, --model or --data this runs the demo. `--help` lists the settings, docs/ explains them,
grpo/__init__.py is the map of the parts.
"""

import sys
from contextlib import closing
from functools import partial

from grpo.config.command_line import load_config, refuse_bad_settings

if __name__ == "__main__":
    refuse_bad_settings(sys.argv[1:])  # before the imports below, which take seconds

from grpo.checkpoints.resume import restore
from grpo.config.settings import Config, total_steps, updates_per_step
from grpo.errors import warn
from grpo.evaluate.held_out import evaluate_sets
from grpo.models.checks import check_lengths, check_vocabulary, stop_token_ids
from grpo.rewards.gold_check import open_checked_rewards
from grpo.rollout import rollout
from grpo.run.main import run_main
from grpo.run.run import Run
from grpo.run.task import load_task
from grpo.runtime.distributed import World
from grpo.training.draws import Draws, Stream
from grpo.training.exchange import deliver
from grpo.training.kl_in_reward import put_kl_into_rewards
from grpo.training.load_policy import load_policy
from grpo.training.minibatches import make_plan
from grpo.training.open_engine import open_engine
from grpo.training.reference_renewal import renew_reference
from grpo.training.rollout_metrics import rest_engine
from grpo.training.scoring import Scoring, gather
from grpo.training.user_table_functions import check_functions


def train(cfg: Config, world: World) -> None:
    """Assemble the parts, then run one loop: P prompts a step, G completions of each, N = P*G rows."""
    run = Run(cfg, world)
    own_sources = check_functions(cfg)  # of the user's own, on tiny inputs, before anything large is loaded
    task = load_task(cfg, run.kept())  # tokenizer, recipe, questions, held-out questions
    columns = [question.columns for question in task.questions.items]
    rewards = open_checked_rewards(cfg, columns, world.is_main)  # in worker processes
    run.identify(task.questions, rewards.rewards, task.tokenizer, **own_sources)
    resumed = run.resume_point()  # a checkpoint folder, or None
    policy = load_policy(cfg, world, resumed)  # the trained model, its optimizer, its reference
    check_lengths(policy.model, cfg.max_prompt_length, cfg.max_generate_length)
    policy.limit_tokens(check_vocabulary(policy.model, task.tokenizer, task.recipe.rules, run.log.write_line))
    stop_ids = stop_token_ids(policy.model, task.tokenizer, task.recipe.end_of_turn, run.log.write_line)
    engine = open_engine(cfg, world, policy, stop_ids, task.tokenizer, run.stopping)

    total, stream = total_steps(cfg, len(task.questions.items)), Stream(cfg, task.questions, policy)
    first = restore(policy, resumed)
    run.log.describe(task.questions, task.held_out, total, policy, rewards.rewards)

    def evaluate(step: int) -> dict[str, float] | None:
        engine.load_weights(policy.weights, policy.counters.updates)
        return evaluate_sets(engine, task, rewards.at(step, total), cfg, world, warn, run.pulse, run.log.log_answers)

    with closing(rewards), run.training(total, first, policy, task.tokenizer, task.recipe):
        for step in range(first, total):
            run.evaluate_if_due(step, first, total, evaluate)
            tally = run.tally(step + 1)
            draws = Draws(stream, policy.counters.drawn)  # the step's groups
            while draws.wanted:  # one round of P prompts; with filter_groups resample until P groups are kept
                with tally.phase("rollout"):
                    prompts, slots = draws.next_prompts()
                    engine.load_weights(policy.weights, policy.counters.updates)
                    scoring = Scoring(cfg, rewards.at(step, total), prompts, task.tokenizer, warn, run.pulse)
                    completions = rollout(engine, prompts, slots, cfg, world, scoring, draws.following(step + 1, total))

                with tally.phase("reward"):
                    scored = scoring.finish(completions)  # waits for the missing scores

                with tally.phase("exchange"):
                    table = gather(world, cfg, rewards.rewards, scored, run.notices(policy, step))  # on every rank
                    run.act_on_notices(table.notices)  # may end the run, on all ranks
                    draws.add(prompts, scored, table)

            with tally.phase("logprobs"):
                rest_engine(engine, tally)
                put_kl_into_rewards(draws, policy, tally)  # with kl_estimator k1_reward
            with tally.phase("exchange"):
                prompts, scored, table = draws.prompts, draws.scored, draws.table  # of all rounds
                advantages = draws.advantages()  # [N], over whole groups
                shares, trained, chosen = policy.scorer.shares_prompts, table.num_trained, draws.chosen
                plan = make_plan(cfg, prompts, table.lengths, advantages, world.size, shares, trained, chosen)
                batches = deliver(world, cfg, plan, prompts, scored.completions, table, advantages, policy.even_block)

            with tally.phase("logprobs"):
                batches = policy.annotate(batches)  # + old and reference log-probs

            with tally.phase("update"):
                on_skip = partial(run.quarantine, (prompts, scored.completions))
                norms = policy.train_on(batches, tally, total * updates_per_step(cfg), table.any_broken, on_skip)
                renew_reference(policy, step + 1)  # with reference_sync_steps

            draws.finish(policy.counters, tally)
            measured = tally.reduce(world)  # metrics over all ranks
            run.log.log_step(step + 1, total, table, advantages, measured, norms, policy, scored.logs)
            run.log.log_samples(step + 1, scored, advantages)
            policy.trust_sampler(measured)
            policy.counters.step = step + 1
            run.save_if_due(step + 1, total)
        run.evaluate_if_due(total, first, total, evaluate)
    run.finish(first, total)


if __name__ == "__main__":
    sys.exit(run_main(train, load_config, sys.argv[1:]))
