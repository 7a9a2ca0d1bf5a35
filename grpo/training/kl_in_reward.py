"""The KL in the reward, as RLOO (arXiv 2402.14740) and REINFORCE++ (arXiv 2501.03262) have it.

    reward of row n  -=  beta * KL_n
    KL_n = sum over the row's trained tokens t of  log p_nt - log ref_nt        k1, summed over the row

p is the policy that sampled the row: its log-probs are the sampler's. The loss has no KL term then, and `annotate`
scores no reference. Advantages need all rewards, so the reference scores before them: a plan of its own, in which
every row with a trained token carries, is delivered and scored like the one that is trained on, and one sum over ranks
gives KL_n of all rows to every rank.

A row without a trained token (`truncated: mask`) has KL 0. A row whose KL is not finite makes the step one that is not
trained on, as logits of the rollout that are not finite do.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from grpo.training.draws import Draws
from grpo.training.exchange import deliver
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.types import MicroBatch


def row_kl(micro: MicroBatch) -> list[float]:
    """[B] sum over each row's trained tokens of sampler - reference log-prob, in nats.

    >>> ids, both = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]])
    >>> sampled, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -7.0]])
    >>> row_kl(MicroBatch((0,), ids, ids, ids, ids[0, :1], both, sampled[0, :1], sampled, ref_logprobs=reference))
    [0.5]
    """
    assert micro.ref_logprobs is not None
    gap = torch.where(micro.trained, micro.sampler_logprobs - micro.ref_logprobs, 0.0)
    return gap.double().sum(-1).tolist()


def kl_of_rows(batches: Sequence[Sequence[MicroBatch]], num_rows: int) -> np.ndarray:
    """[N] the KL of the rows that this rank has scored, 0 for the others. Idle micro-batches hold row -1."""
    kl = np.zeros(num_rows)
    for micro in (micro for minibatch in batches for micro in minibatch):
        for row, value in zip(micro.rows, row_kl(micro), strict=True):
            if row >= 0:
                kl[row] = value
    return kl


def put_kl_into_rewards(draws: Draws, policy: Policy, tally: Tally) -> None:
    """With kl_estimator k1_reward: score the chosen groups' rows and set `draws.kl_penalty`, equally on every rank."""
    cfg, world, table = policy.cfg, policy.world, draws.table
    if cfg.kl_estimator != "k1_reward":
        return
    carried = np.ones(len(table.rewards))  # in place of the advantages, which are not known yet
    shares, trained = policy.scorer.shares_prompts, table.num_trained
    plan = make_plan(cfg, draws.prompts, table.lengths, carried, world.size, shares, trained, draws.chosen)
    batches = deliver(world, cfg, plan, draws.prompts, draws.scored.completions, table, carried, policy.even_block)
    mine = kl_of_rows(policy.annotate(batches, for_rewards=True), len(carried))
    kl = world.sum_rows(mine[:, None])[:, 0]
    if world.is_main:
        scored = np.isin(np.arange(len(kl)) // cfg.num_generations, draws.chosen)
        tally.mean("kl", float(kl.sum()), float(trained[scored].sum()))
    if not np.isfinite(kl).all():
        broken = np.maximum(table.facts["broken"], ~np.isfinite(kl))
        draws.table = replace(table, facts={**table.facts, "broken": broken})
    draws.kl_penalty = cfg.beta * kl
