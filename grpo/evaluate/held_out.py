"""Answers to held-out questions during training, on all ranks: one greedy one, or several sampled as in training.

Logged is the mean of every reward function. Where the first one of the config only says right or wrong (1 or 0, or as
its mark `right` says), `eval/accuracy` is the share of answers that it calls right. With `eval_generations` n there are
n answers to a question, drawn from the run's sampling distribution, and pass@k and maj@n as in statistics.py. An answer
is read where the task marks it (`answer_marks`); a task that marks none has no maj@n.

The random numbers of an answer are keyed by its question's place in the set and by its own number, so they depend
neither on the ranks nor on other sets, and are the same in every evaluation and in `python -m grpo.evaluate`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.config.held_out import eval_tag
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.evaluate.ask import FIRST_SLOT
from grpo.evaluate.extract import normal_form
from grpo.evaluate.statistics import of_several_answers
from grpo.reward_library.scanning import inside
from grpo.rewards import Reward, RewardInput, completion_text, short_names
from grpo.rewards.pool import Rewards
from grpo.rollout import Engine, Request
from grpo.rollout.chunks import cut_chunks
from grpo.rollout.sampling import Sampling, sampling_of
from grpo.run.completions_log import answer_marks, user_metrics
from grpo.run.task import Task
from grpo.runtime.distributed import World
from grpo.runtime.shares import shares_of
from grpo.training.scoring import Scored, Scoring
from grpo.types import Completion, Prompt, Pulse


def evaluate_sets(
    engine: Engine,
    task: Task,
    rewards: Rewards,
    cfg: Config,
    world: World,
    report: Callable[[str], None],
    pulse: Pulse = lambda: False,
    keep: Callable[[str, Scored], None] = lambda name, scored: None,
) -> dict[str, float] | None:
    """`evaluate` every set; the metrics of a set that has a name carry it: eval/NAME/accuracy.

    keep: gets the name of a set and this rank's scored answers to its questions.
    """
    metrics: dict[str, float] = {}
    for name, questions in task.held_out.items():
        of_set = evaluate(engine, questions, rewards, task.tokenizer, cfg, world, report, pulse, partial(keep, name))
        if of_set is None:
            return None
        metrics |= {eval_tag(name, metric): value for metric, value in of_set.items()}
    return metrics


def evaluate(
    engine: Engine,
    questions: Questions,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
    world: World,
    report: Callable[[str], None],
    pulse: Pulse = lambda: False,
    keep: Callable[[Scored], None] = lambda scored: None,
) -> dict[str, float] | None:
    """Answer every held-out question and score the answers. Equal on every rank; None: `pulse` asked to stop.

    Answers are scored while others are still being sampled; `report` gets a reward function's first failures of the
    whole evaluation, `keep` this rank's scored answers when all are there.
    """
    # longest first, so that a chunk's prompts have similar lengths
    prompts = sorted(questions.items, key=lambda prompt: (-len(prompt.token_ids), prompt.data_row))
    num_each = cfg.eval_generations or 1
    sampling = sampling_of(cfg) if cfg.eval_generations else Sampling(temperature=0.0, logit_clamp=cfg.logit_clamp)
    marks = answer_marks(cfg, rewards.rewards)
    num_rewards = len(rewards.rewards)
    # one line per answer: scores, length, vote; the last line: asked to stop
    table = np.zeros((len(prompts) * num_each + 1, num_rewards + 2))
    scoring = Scoring(cfg, rewards, prompts, tokenizer, report, pulse, num_generations=num_each)
    shares = shares_of(cfg, world.size)
    chunks = cut_chunks(len(prompts), num_each, engine.chunk_rows or cfg.rollout_chunk_rows, shares, scoring.grouped)
    completions: list[Completion] = []
    # sample and score this rank's chunks
    for i in world.deal(len(chunks)):
        requests = _requests_of(chunks[i], prompts, num_each)
        sampled = engine.generate(requests, sampling, scoring.pulse, on_finished=scoring.take)
        completions += [dataclasses.replace(one, support=None) for one in sampled]  # the largest part of their memory
        if scoring.pulse():
            break
    scored = scoring.finish(completions)
    # sum the rows of all ranks
    if scoring.pulse():  # answers or scores may be incomplete
        table[-1] = 1
    elif completions:
        lengths = [len(one.token_ids) for one in completions]
        votes = [_vote(one, marks) for one in scored.inputs]
        table[[one.row for one in completions]] = np.column_stack([scored.scores, lengths, votes])
    table, stop = np.split(world.sum_rows(table), [-1])
    if stop.any():
        return None
    keep(scored)
    scores, length, vote = np.split(table, [num_rewards, num_rewards + 1], axis=1)
    metrics = {"eval/length_mean": float(length.mean())}
    right = right_answers(scores[:, 0], rewards.rewards[0])
    if right is not None:
        metrics["eval/accuracy"] = float(right.mean())
        if cfg.eval_generations:
            votes_of = vote.reshape(-1, num_each) if marks is not None and num_each > 1 else None
            metrics |= _of_several_answers(right.reshape(-1, num_each), votes_of)
    for k, short in enumerate(short_names([reward.name for reward in rewards.rewards]).values()):
        column = scores[:, k][~np.isnan(scores[:, k])]
        if len(column):
            metrics[f"eval/{short}"] = float(column.mean())
    return metrics | user_metrics(world, rewards.rewards, scored.logs, "eval/")


def _requests_of(chunk: Sequence[int], prompts: Sequence[Prompt], num_each: int) -> list[Request]:
    """The requests behind a chunk's rows, n = p * num_each + g."""
    places = ((n, prompts[n // num_each], n % num_each) for n in chunk)
    return [Request(n, FIRST_SLOT + prompt.data_row, g, prompt.token_ids) for n, prompt, g in places]


def _vote(answered: RewardInput, marks: tuple[str, str] | None) -> float:
    """The answer in a completion as a number that is equal for equal answers; 0: none is marked."""
    found = inside(completion_text(answered.completion), *marks) if marks is not None else None
    vote = normal_form(found, "number")
    bits = hashlib.sha256((vote or "").encode("utf-8", "surrogatepass")).digest()[:6]
    return 1.0 + int.from_bytes(bits, "big") if vote else 0.0  # 48 bits are exact in a float64


def _of_several_answers(right: np.ndarray, votes: np.ndarray | None) -> dict[str, float]:
    """Metrics of [questions, answers]."""
    given = None if votes is None else [[vote or None for vote in own] for own in votes.tolist()]
    shares = of_several_answers(right.tolist(), given)
    error = shares["pass@1"][1]
    metrics = {} if math.isnan(error) else {"eval/accuracy_se": error}
    return metrics | {f"eval/{name}": value for name, (value, _) in shares.items()}


def right_answers(scores: np.ndarray, reward: Reward) -> np.ndarray | None:
    """Which answers are right, from the [N] scores of a function that only says right or wrong; None for another one.

    An answer to which it does not apply (NaN) is not right. A refusal is not right either.

    >>> right_answers(np.array([1.0, 0.0, np.nan, 1.0]), Reward("f", 1.0)).tolist()
    [True, False, False, True]
    >>> right_answers(np.array([0.5, 0.5]), Reward("f", 1.0)) is None
    True
    """
    known = scores[~np.isnan(scores)]
    if not len(known) or not np.isin(known, [0.0, reward.worth_of_refusal, reward.right]).all():
        return None
    return np.nan_to_num(scores) > reward.worth_of_refusal
