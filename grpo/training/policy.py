"""The policy: the model being trained, its optimizer, its frozen reference.

One update: for each of this rank's micro-batches log-probs, loss, backward; then the backend sums gradients over ranks,
clips their norm and steps the optimizer, or drops them on all ranks when the norm is not finite.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.settings import Config, kl_in_loss, updates_per_step
from grpo.forward.logprobs import Scorer
from grpo.forward.recomputed import recompute_cheap_activations, recomputes_cheap
from grpo.models.checks import is_lora
from grpo.models.offload import ActivationOffload, on_device
from grpo.models.trial import enable_checkpointing
from grpo.runtime.checksums import checksums, first_difference
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import FittingSize, OutOfMemory, ran_out
from grpo.training.backends import Backend, load_backend
from grpo.training.entropy import EntropyTerms
from grpo.training.losses import LossInputs, policy_loss
from grpo.training.metrics import Reduced, Tally, declare
from grpo.training.router_balance import RouterBalance
from grpo.training.sampler_correction import check_gap
from grpo.training.schedule import learning_rate
from grpo.training.skipped_updates import SkippedUpdate, count_skip
from grpo.training.special_micro_batches import halves
from grpo.training.user_surrogate import load_surrogate
from grpo.types import Counters, Extra, MicroBatch, Pulse

Result = TypeVar("Result")

declare(counts=("guards/oom_update",))

MAX_TRUSTED_GAP = 1e-4  # largest |sampler - trainer| log-prob for sampler log-probs to serve as old ones


class Policy:
    """The trained model behind one backend."""

    def __init__(self, cfg: Config, world: World, model: PreTrainedModel, reference: PreTrainedModel | None = None):
        self.cfg = cfg
        self.world = world
        self.model = model
        self.surrogate, _ = load_surrogate(cfg)
        self.counters = Counters()
        self.extras: dict[str, Extra] = {}  # by name
        self.last_lr = 0.0
        self.gap_limit = math.inf  # of the sampler's log-probs, in nats
        self.unseen: float | None = None  # a movement that bf16 rounds away: see grpo/models/bf16_numbers.py
        if cfg.gradient_checkpointing:
            enable_checkpointing(model)
        if recomputes_cheap(cfg):
            recompute_cheap_activations(model)
        self.reference = None if reference is None else Scorer(reference.requires_grad_(False), cfg)
        self.shares_reference = cfg.beta > 0 and is_lora(model)  # the model itself, without its adapter
        self.activation_offload = ActivationOffload(model)
        self.scorer = scorer = Scorer(model, cfg)
        self.entropy = EntropyTerms(cfg, world, scorer)
        self.balance = RouterBalance(scorer) if cfg.router_aux_loss_coef else None
        self.vocab_size = self.num_tokens = scorer.head.vocab_size
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())  # before any sharding
        self.backend: Backend = load_backend(cfg, world, scorer)
        self.even_block = scorer.block_tokens if self.backend.even_work else 0
        self.fitting = FittingSize("update", "micro_batch_tokens", "tokens")
        self.known_checksums: dict[str, int] = {}
        self.pulse: Pulse = lambda: False  # called at each micro-batch; an update that began is finished

    def limit_tokens(self, count: int) -> None:
        """Ids from `count` on are no tokens: see Head."""
        self.num_tokens = count
        for scorer in (self.scorer, self.reference):
            if scorer is not None:
                scorer.head.num_tokens = count

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.backend.weights()

    def remember_checksums(self) -> None:
        """Compute checksums of this rank's weights and optimizer state, to be compared before the next update."""
        self.known_checksums = checksums(self.backend.local_tensors())

    def changed_tensor(self) -> str | None:
        """A tensor that changed since `remember_checksums`, without an update; None: no tensor changed."""
        if not self.known_checksums:
            return None
        return first_difference(self.known_checksums, checksums(self.backend.local_tensors()))

    def _reference_logprobs(self, micro: MicroBatch) -> Tensor | None:
        if self.shares_reference:
            from grpo.models.lora import as_reference  # late: peft takes seconds

            with as_reference(self.model):
                return self.backend.score(micro)
        return None if self.reference is None else self.reference(micro)

    @torch.no_grad()
    def annotate(self, batches: Sequence[Sequence[MicroBatch]], for_rewards: bool = False) -> list[list[MicroBatch]]:
        """Add old and reference log-probs, before the first update of the step.

        The old ones are the sampler's where it is trusted. Else they are the policy's: with one update per step those
        of the update's own forward, detached (None); with several, of another. for_rewards: the reference's alone.
        """
        refers = for_rewards or kl_in_loss(self.cfg)
        offloaded = self.reference if self.cfg.reference_offload and refers else None

        def annotated(micro: MicroBatch) -> MicroBatch:
            self.pulse()
            micro = micro if for_rewards else self.entropy.before_updates(micro, self.backend)
            old = micro.old_logprobs  # of the forward for entropies, if any
            if self.counters.trust_sampler:
                old = micro.sampler_logprobs
            elif updates_per_step(self.cfg) > 1 and old is None and not for_rewards:
                old = self.backend.score(micro)
            reference = self._reference_logprobs(micro) if refers else None
            return dataclasses.replace(micro, old_logprobs=old, ref_logprobs=reference)

        with on_device(offloaded, self.world.device) if offloaded is not None else nullcontext():
            found = [self._within_memory(minibatch, lambda pieces: [*map(annotated, pieces)]) for minibatch in batches]
        return found if for_rewards else self.entropy.weighted(found)

    def _within_memory(self, minibatch: Sequence[MicroBatch], work: Callable[[list[MicroBatch]], Result]) -> Result:
        """Run `work` on a minibatch; when memory runs out, run it again on smaller micro-batches.

        Raises OutOfMemory when a single row does not fit, or at once where a micro-batch is a collective.
        """
        while True:
            pieces = list(minibatch)
            while (index := next((i for i, m in enumerate(pieces) if self._too_big(m)), None)) is not None:
                pieces[index : index + 1] = halves(pieces[index])
            try:
                result = work(pieces)
                self.fitting.fitted()
                return result
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            largest = max(pieces, key=lambda micro: micro.input_ids.numel())
            shape = f"{largest.input_ids.shape[0]} rows of {largest.input_ids.shape[1]} tokens"
            if self.backend.even_work:
                raise OutOfMemory(
                    f"update: out of memory with {shape}; zero_stage {self.cfg.zero_stage} cannot try again in smaller "
                    f"pieces. Lower micro_batch_tokens (now {self.cfg.micro_batch_tokens}) and run the same command."
                )
            self.backend.forget()
            self.fitting.halve(largest.input_ids.numel(), smallest=len(largest.rows) == 1, shape=shape)

    def _too_big(self, micro: MicroBatch) -> bool:
        tokens = micro.input_ids.numel()
        return len(micro.rows) > 1 and tokens > self.fitting.part(tokens)

    def loss(self, micro: MicroBatch, tally: Tally, weights_unchanged: bool) -> Tensor:
        """Weighted loss of a micro-batch, already divided by the global denominator."""
        assert micro.weights is not None
        logprobs = self.entropy.score(micro, self.backend)  # [B, T]
        old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        given = (micro.ref_logprobs, micro.sampler_logprobs, micro.advantages, micro.trained, micro.chosen)
        inputs = LossInputs(logprobs, old, *given)
        trust = bool(self.counters.trust_sampler)
        token_loss, measured = policy_loss(inputs, micro.weights, self.cfg, self.surrogate, trust, weights_unchanged)
        token_loss = self.entropy.add(token_loss, micro, measured.means, self.counters)
        if self.balance is not None:
            token_loss = self.balance.add(token_loss, micro, measured.means)
        loss = token_loss.sum()
        tally.micro_batch(loss.detach(), measured.means, measured.maxima, micro.trained, measured.sampler_gap)
        return loss

    def update(
        self, minibatch: Sequence[MicroBatch], tally: Tally, total_updates: int, weights_unchanged: bool
    ) -> float:
        """Take one optimizer step on a minibatch. Returns the gradient norm before clipping.

        Raises SkippedUpdate, on every rank alike, when a loss or gradient of any rank is not finite: gradients are
        dropped, weights and moments stay.
        """
        self.backend.train(True)
        tally.updates += 1
        mark = tally.mark()

        def accumulate(pieces: list[MicroBatch]) -> list[Tensor]:
            tally.rewind(mark)  # of an attempt that ran out of memory
            self.entropy.parts.clear()
            losses: list[Tensor] = []
            # Exactly 1 until a loss is not finite, then NaN. A NaN gradient reaches all ranks without a flag of its
            # own: the sum over ranks, and so the norm, is NaN everywhere. Nothing is read: no device sync.
            one_or_nan: Tensor | float = 1.0
            for i, micro in enumerate(pieces):
                self.pulse()
                self.key_dropout(micro)
                # forward
                with self.activation_offload.around(self.cfg.activation_offload):
                    loss = self.loss(micro, tally, weights_unchanged)
                losses.append(loss.detach())
                # backward; during the last one the backend may begin to sum over ranks
                one_or_nan = one_or_nan + 0.0 * losses[-1]
                self.backend.backward(loss * one_or_nan, last=i + 1 == len(pieces))
            tally.settle()  # the one device sync, so that the phase's seconds are those of its work
            return losses

        with tally.phase("micro_batches"):
            losses = self._within_memory(minibatch, accumulate)
        lr = learning_rate(self.cfg, self.counters.updates, total_updates)
        with tally.phase("reduce"):
            norm = self.backend.step(lr, self.cfg.max_grad_norm)
        self.backend.train(False)
        if not math.isfinite(norm):
            raise SkippedUpdate(f"gradient norm {norm}", torch.stack(losses).tolist() if losses else [])
        self.last_lr = lr
        self.entropy.after_update(self.counters, tally)
        self.counters.updates += 1
        return norm

    def key_dropout(self, micro: MicroBatch) -> None:
        """Choose the dropout masks of an adapter for this micro-batch of the next update."""
        if not self.cfg.lora_dropout:
            return
        from grpo.models.lora import key_dropout  # late: peft takes seconds

        key_dropout(self.model, self.cfg.seed, self.counters.updates, max(0, min(micro.rows, default=0)))

    def train_on(
        self,
        batches: Sequence[Sequence[MicroBatch]],
        tally: Tally,
        total_updates: int,
        broken: bool,
        on_skip: Callable[["Policy", Sequence[MicroBatch], SkippedUpdate, int], None],
    ) -> list[float]:
        """Pass `num_iterations` times over a step's minibatches. Returns the gradient norms of the updates taken.

        broken: logits of the rollout were not finite, so every update of the step is skipped. Skipped updates are
        counted and passed to `on_skip`. Raises Diverged after too many in a row.
        """
        norms = []
        for iteration in range(self.cfg.num_iterations):
            for i, minibatch in enumerate(batches):
                try:
                    if broken:
                        raise SkippedUpdate("logits of the rollout were not finite", [])
                    norms.append(self.update(minibatch, tally, total_updates, iteration == i == 0))
                    self.counters.consecutive_skips = 0
                except SkippedUpdate as skip:
                    on_skip(self, minibatch, skip, iteration)
                    count_skip(self.counters, self.cfg.max_bad_steps)
        tally.add("guards/oom_update", self.fitting.halvings)
        if self.cfg.check_weights_steps:
            self.remember_checksums()
        return norms

    def trust_sampler(self, measured: Reduced) -> None:
        """Decide whether the sampler's log-probs serve as the next step's old ones, and whether it can be used at all.

        Nothing changes in a step that did not measure it. Raises Lost, on every rank alike.
        """
        if self.cfg.rollout_ahead:  # the sampler is an older policy: its log-probs are no old ones, and differ
            self.counters.trust_sampler = False
        elif measured.sampler_gap is not None:
            check_gap(measured.metrics, self.gap_limit)
            self.counters.trust_sampler = measured.sampler_gap <= MAX_TRUSTED_GAP
