"""Log-probs of completion tokens without ever holding [B, T, V].

    hidden [B, L, H] -> the positions that predict completion tokens [M, H] -> blocks of the head -> [M]

Only completion positions meet the head, in blocks of at most `logits_chunk_mb`; a block's logits are
recomputed in the backward (torch.utils.checkpoint), so that one block is alive at a time. The softmax is
fp32. Sampling and scoring share `bounded_logits`: one distribution.

How a model turns hidden states into logits is read from its output embeddings and config, and checked
against the model's own logits once; a head we do not understand falls back to the whole forward.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.types import MicroBatch

BLOCK_ELEMENTS_PER_MB = 2**20 // 4  # fp32 logits


def bounded_logits(logits: Tensor, temperature: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Centre each row on its mid-range, clamp to ±clamp, divide by the temperature. logits [..., V] fp32.

    softmax is unchanged by a shift, so a row whose range fits is left as it is. Also returns how many
    logits of each row the clamp moved, [...] int64.

    >>> bounded_logits(torch.tensor([1e4, -1e4]), 1.0, 100.0)[0].tolist()
    [100.0, -100.0]
    """
    high, low = logits.detach().amax(-1, keepdim=True), logits.detach().amin(-1, keepdim=True)
    moved = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if bool((high - low > 2 * clamp).any()):
        centred = logits - (high + low) / 2
        moved = (centred.detach().abs() > clamp).sum(-1)
        logits = centred.clamp(-clamp, clamp)
    return (logits if temperature == 1.0 else logits / temperature), moved


class Head:
    """hidden [M, H] -> logits [M, V] for one model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        if getattr(config, "logits_scaling", None):
            self.scale /= float(config.logits_scaling)
        self.usable = self._matches_the_model()

    def body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model if self.model.base_model is not self.model else self.model.get_decoder()

    def logits(self, hidden: Tensor) -> Tensor:
        """The head alone, as the model applies it."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @torch.no_grad()
    def _matches_the_model(self) -> bool:
        """Compare with the model's own logits on a few tokens; a mismatch means whole logits, and a notice.

        Done once, at construction, on every rank alike: a sharded model's forward is a collective.
        """
        ids = torch.arange(8, device=self.model.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        if not bool(torch.isfinite(own).all()):
            return True  # broken weights tell nothing about the head; the guards will meet them
        try:
            ours = self.logits(self.body()(input_ids=ids, use_cache=False).last_hidden_state).float()
            scale = own.abs().amax().clamp(min=1.0)
            matches = ours.shape == own.shape and bool((ours - own).abs().amax() <= 1e-2 * scale)
        except (AttributeError, TypeError, RuntimeError):
            matches = False
        if not matches:
            warnings.warn(
                f"{type(self.model).__name__}: the head could not be applied in blocks, whole logits are used: "
                "more memory, same numbers.",
                stacklevel=2,
            )
        return matches


def token_logprobs(head: Head, micro: MicroBatch, temperature: float, clamp: float, chunk_mb: int) -> Tensor:
    """Log-probs [B, T] of the completion tokens under the sampling distribution; 0 outside the mask.

    No attention mask is passed: rows are padded on the right, and no token looks to its right.
    """
    rows = torch.arange(micro.input_ids.shape[0], device=micro.input_ids.device)[:, None].expand_as(micro.positions)
    where = (rows[micro.mask], micro.positions[micro.mask])  # [M], [M]
    targets = micro.target_ids[micro.mask]  # [M]
    support = None if micro.support is None else micro.support[micro.mask]  # [M, K]
    if head.usable:
        hidden = head.body()(input_ids=micro.input_ids, use_cache=False).last_hidden_state
        values = _in_blocks(head, hidden[where], targets, support, temperature, clamp, chunk_mb)
    else:
        logits = head.model(input_ids=micro.input_ids, use_cache=False).logits[where]
        values = _pick(logits, targets, support, temperature, clamp)
    logprobs = torch.zeros(micro.mask.shape, dtype=torch.float32, device=values.device)
    return logprobs.masked_scatter(micro.mask, values)


def _in_blocks(
    head: Head, hidden: Tensor, targets: Tensor, support: Tensor | None, temperature: float, clamp: float, chunk_mb: int
) -> Tensor:
    vocab = head.model.get_output_embeddings().weight.shape[0]
    block = max(1, chunk_mb * BLOCK_ELEMENTS_PER_MB // vocab)  # tokens
    if hidden.shape[0] <= block or not torch.is_grad_enabled():
        parts = [
            _block(
                head, h, targets[i : i + block], None if support is None else support[i : i + block], temperature, clamp
            )
            for i, h in zip(range(0, hidden.shape[0], block), hidden.split(block), strict=True)
        ]
    else:
        parts = [
            checkpoint(
                _block, head, h, targets[i : i + block], None if support is None else support[i : i + block],
                temperature, clamp, use_reentrant=False, preserve_rng_state=False,
            )
            for i, h in zip(range(0, hidden.shape[0], block), hidden.split(block), strict=True)
        ]  # fmt: skip
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _block(
    head: Head, hidden: Tensor, targets: Tensor, support: Tensor | None, temperature: float, clamp: float
) -> Tensor:
    return _pick(head.logits(hidden), targets, support, temperature, clamp)


def _pick(logits: Tensor, targets: Tensor, support: Tensor | None, temperature: float, clamp: float) -> Tensor:
    """logits [M, V], targets [M] -> log-probs [M], over the support where there is one."""
    bounded, _ = bounded_logits(logits.float(), temperature, clamp)
    chosen = bounded.gather(-1, targets[:, None])[:, 0]
    if support is not None:
        bounded = bounded.gather(-1, support.clamp(min=0)).masked_fill(support < 0, -torch.inf)
    return chosen - torch.logsumexp(bounded, dim=-1)
