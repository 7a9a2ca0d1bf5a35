"""The policy of supervised training: the same updates as in GRPO with the loss of supervised training.

    loss = - sum over texts and trained tokens of log p(token) / (trained tokens of the whole step, over all ranks)

Log-probs are those of temperature 1 over the whole vocabulary. Weights are divided before the backward, gradients
are summed over ranks: see grpo/training/losses.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.settings import Config
from grpo.config.sft_section import own_settings
from grpo.forward.precision import arithmetic
from grpo.runtime.distributed import World
from grpo.sft.packing import check_packing, collate_packs, pack
from grpo.training.losses import row_weights
from grpo.training.metrics import Tally, declare
from grpo.training.minibatches import Minibatch, assign, cut_micro_batches
from grpo.training.policy import Policy
from grpo.training.special_micro_batches import even_out
from grpo.types import MicroBatch, TrainRow

declare(means=("sft/token_accuracy",))


def sft_batches(cfg: Config, world: World, rows: Sequence[TrainRow], even_block: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches of a step's texts. The micro-batches do not depend on the number of ranks.

    even_block: see `deliver` in grpo/training/exchange.py.
    """
    lengths = [len(row.prompt_ids) + len(row.token_ids) - 1 for row in rows]  # the last token predicts nothing
    capacity = cfg.max_prompt_length + cfg.max_generate_length
    packs = pack(lengths, capacity) if own_settings(cfg).packing else [(n,) for n in range(len(rows))]
    sizes = [sum(lengths[n] for n in texts) for texts in packs]
    num_trained = np.array([sum(len(rows[n].token_ids) for n in texts) for texts in packs])
    micro_batches = cut_micro_batches(range(len(packs)), sizes, cfg.micro_batch_tokens)
    owners = assign([len(micro) * sizes[micro[0]] for micro in micro_batches], world.size)
    plan = Minibatch(tuple(range(len(packs))), tuple(micro_batches), tuple(owners))
    [weight, *_] = row_weights("dapo", num_trained.tolist(), cfg.max_generate_length)  # 1 / trained tokens
    mine = [
        collate_packs(micro, [[rows[n] for n in packs[number]] for number in micro], weight, world.device)
        for micro in plan.of_rank(world.rank)
    ]
    return even_out(mine, plan, num_trained, even_block, world) if even_block else mine


class SftPolicy(Policy):
    """A policy that is trained on given completions."""

    def __init__(self, cfg: Config, world: World, model: PreTrainedModel, reference: PreTrainedModel | None = None):
        """Raises UserError when rows are to be packed and the model mixes packed texts."""
        if own_settings(cfg).packing:
            with arithmetic(cfg.dtype, world.device):
                check_packing(model)
        super().__init__(cfg, world, model, reference)
        self.scorer.counts_hits = True

    def loss(self, micro: MicroBatch, tally: Tally, weights_unchanged: bool) -> Tensor:
        """Weighted negative log-probs of a micro-batch, already divided by the global denominator."""
        assert micro.weights is not None
        logprobs = self.backend.score(micro)  # [B, T]
        token_loss = -torch.where(micro.trained, logprobs, 0.0) * micro.weights
        assert self.scorer.hits is not None
        means = {"sft/token_accuracy": self.scorer.hits}
        if self.balance is not None:
            token_loss = self.balance.add(token_loss, micro, means)
        loss = token_loss.sum()
        tally.micro_batch(loss.detach(), means, {}, micro.trained)
        return loss

    @torch.no_grad()
    def measure(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Loss and token accuracy on texts, over all ranks and the same on every rank. Trains nothing."""
        batches = sft_batches(self.cfg, self.world, rows, self.even_block)

        def add_up(micro_batches: list[MicroBatch]) -> np.ndarray:
            """[3]: sums of negative log-probs, correct tokens, trained tokens."""
            totals = []
            for micro in micro_batches:
                self.pulse()
                logprobs = self.backend.score(micro)
                assert self.scorer.hits is not None
                negative_logprobs = -torch.where(micro.trained, logprobs, 0.0).sum(dtype=torch.float64)
                hits = (self.scorer.hits & micro.trained).sum()
                totals.append(torch.stack([negative_logprobs, hits, micro.trained.sum()]))
            return torch.stack(totals).cpu().numpy().sum(axis=0) if totals else np.zeros(3)

        negative_logprobs, hits, tokens = self.world.sum_rows(self._within_memory(batches, add_up))
        return {"eval/loss": float(negative_logprobs / tokens), "eval/token_accuracy": float(hits / tokens)}
