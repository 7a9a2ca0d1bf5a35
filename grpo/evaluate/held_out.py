"""Greedy answers to held-out questions during training, on all ranks, one completion per question.

Logged is the mean of every reward function. Where the first one of the config only says right or wrong (1 or 0, or as
its mark `right` says), `eval/accuracy` is the share of questions that it calls right.
"""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.rewards import Reward, short_names
from grpo.rewards.pool import Rewards
from grpo.rollout import Engine, cut_chunks, requests_of
from grpo.rollout.sampling import Sampling
from grpo.run.completions_log import user_metrics
from grpo.runtime.distributed import World
from grpo.training.scoring import Scoring
from grpo.types import Completion, Pulse


def evaluate(
    engine: Engine,
    questions: Questions,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
    world: World,
    report: Callable[[str], None],
    pulse: Pulse = lambda: False,
    temperature: float = 0.0,
) -> dict[str, float] | None:
    """Answer every held-out question once and score the answers. Equal on every rank; None: `pulse` asked to stop.

    Answers are scored while others are still being sampled; `report` gets a reward function's first failures of the
    whole evaluation.
    """
    # longest first, so that a chunk's prompts have similar lengths
    prompts = sorted(questions.items, key=lambda prompt: (-len(prompt.token_ids), prompt.data_row))
    sampling = Sampling(temperature=temperature, logit_clamp=cfg.logit_clamp)
    table = np.zeros((len(prompts) + 1, len(rewards.rewards) + 1))  # scores and length; the last line: asked to stop
    chunks = cut_chunks(len(prompts), 1, cfg.rollout_chunk_rows)
    scoring = Scoring(cfg, rewards, prompts, tokenizer, report, pulse, num_generations=1)
    completions: list[Completion] = []
    # sample and score this rank's chunks
    for i in world.deal(len(chunks)):
        requests = requests_of(chunks[i], prompts, 1, first_slot=0)
        completions += engine.generate(requests, sampling, scoring.pulse, on_finished=scoring.take)
        if scoring.pulse():
            break
    scored = scoring.finish(completions)
    # sum the rows of all ranks
    if scoring.pulse():  # answers or scores may be incomplete
        table[-1] = 1
    elif completions:
        table[[one.row for one in completions]] = np.column_stack(
            [scored.scores, [len(c.token_ids) for c in completions]]
        )
    table, stop = np.split(world.sum_rows(table), [-1])
    if stop.any():
        return None
    metrics = {"eval/length_mean": float(table[:, -1].mean())}
    share = accuracy(table[:, 0], rewards.rewards[0])
    if share is not None:
        metrics["eval/accuracy"] = share
    for k, short in enumerate(short_names([reward.name for reward in rewards.rewards]).values()):
        column = table[:, k][~np.isnan(table[:, k])]
        if len(column):
            metrics[f"eval/{short}"] = float(column.mean())
    return metrics | user_metrics(world, rewards.rewards, scored.logs, "eval/")


def accuracy(scores: np.ndarray, reward: Reward) -> float | None:
    """Share of right answers, from the [N] scores of a function that only says right or wrong; None for another one.

    A question to which it does not apply (NaN) is not answered right. A refusal is not right either.

    >>> accuracy(np.array([1.0, 0.0, np.nan, 1.0]), Reward("f", 1.0))
    0.5
    >>> accuracy(np.array([0.5, 0.5]), Reward("f", 1.0)) is None
    True
    """
    known = scores[~np.isnan(scores)]
    if not len(known) or not np.isin(known, [0.0, reward.worth_of_refusal, reward.right]).all():
        return None
    return float((np.nan_to_num(scores) > reward.worth_of_refusal).mean())
