"""Log-probs of completion tokens without ever holding [B, T, V].

    hidden [B, L, H] -> the positions that predict completion tokens [M, H] -> blocks of the head -> [M]

The head is applied to completion positions only, in blocks of at most `logits_chunk_mb`; a block's logits are computed
again in the backward (torch.utils.checkpoint), so that one block is in memory at a time. The softmax is fp32. Sampling
and scoring share `bounded_logits`, and so one distribution.

`Head` applies a model's output embeddings with the scale and soft cap of its config. It is compared with the model's
own logits once, when it is made; where they differ, the simple path is used: the model's whole forward.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.config.settings import Config
from grpo.forward.arguments import accepted
from grpo.forward.flat_rows import flatten_micro_batch
from grpo.forward.fused_head import HeadLogprobs, plain_matrix
from grpo.forward.head_check import matches_the_model
from grpo.forward.modes import set_mode
from grpo.forward.precision import arithmetic, arithmetic_dtype, host_reads_are_free
from grpo.forward.shared_attention import can_share
from grpo.forward.token_entropy import entropy_of
from grpo.types import Flat, MicroBatch

FLAT_BELOW = 0.95  # of the padded tokens; above, padded rows in few attention calls are faster than a flat row in many
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
BLOCK_ELEMENTS_PER_MB = 2**20 // 4  # fp32 logits
Picked = tuple[Tensor, Tensor, Tensor]  # log-probs [M]; hits [M] and entropies [M], each empty unless it is asked for


def bounded_logits(logits: Tensor, temperature: float, clamp: float) -> tuple[Tensor, Tensor]:
    """Centre each row on its mid-range, clamp to ±clamp, divide by the temperature. logits [..., V] fp32.

    A shift does not change the softmax, so a row whose range is within 2 * clamp is left as it is, whatever other rows
    hold. Also returns how many logits of each row the clamp changed, [...] int64.

    >>> bounded_logits(torch.tensor([1e4, -1e4]), 1.0, 100.0)[0].tolist()
    [100.0, -100.0]
    """
    high, low = logits.detach().amax(-1, keepdim=True), logits.detach().amin(-1, keepdim=True)
    moved = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    wide = high - low > 2 * clamp
    if not host_reads_are_free(logits.device) or bool(wide.any()):
        centred = logits - (high + low) / 2
        moved = (wide & (centred.detach().abs() > clamp)).sum(-1)
        logits = torch.where(wide, centred.clamp(-clamp, clamp), logits)
    return (logits if temperature == 1.0 else logits / temperature), moved


class Head:
    """hidden [M, H] -> logits [M, V] for one model."""

    def __init__(self, model: PreTrainedModel, dtype: str = "fp32"):
        self.model = model
        self.dtype = dtype
        config = model.config.get_text_config()
        caps = [getattr(config, name, None) for name in SOFT_CAPS]
        self.softcap: float | None = next((cap for cap in caps if cap), None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        if getattr(config, "logits_scaling", None):
            self.scale /= float(config.logits_scaling)
        self.num_tokens = self.vocab_size  # ids from here on are no tokens: they are neither sampled nor weighed
        self.usable = matches_the_model(self)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model.config.get_text_config().vocab_size)

    def matrix(self) -> Tensor | None:
        """The head's weight [V, H] where the head is one matrix and a scale; else None."""
        return None if self.softcap is not None else plain_matrix(self.model.get_output_embeddings())

    def body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model if self.model.base_model is not self.model else self.model.get_decoder()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], with the model's own scale and soft cap."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class Scorer(nn.Module):
    """A micro-batch -> log-probs [B, T] of its completion tokens.

    It is a module so that a sharded backend can wrap it: its forward is then the root of the modules to gather.
    """

    def __init__(self, model: PreTrainedModel, cfg: Config):
        super().__init__()
        self.model = model
        self.head = Head(model, cfg.dtype)
        self.cfg = cfg
        with arithmetic(cfg.dtype, model.device):
            self.shares_prompts = self.head.usable and can_share(model, self.head.body())
        self.sharded = cfg.backend == "deepspeed" and cfg.zero_stage == 3  # the head is whole in its own forward only
        self.counts_hits = False  # whether `hits` is computed
        self.hits: Tensor | None = None  # [B, T] bool, of the last forward: the target is the likeliest token
        self.measures_entropy = False  # whether `entropy` is computed
        self.entropy: Tensor | None = None  # [B, T] nats, of the last forward, with gradient; 0 where not trained
        self.block_tokens = max(1, cfg.logits_chunk_mb * BLOCK_ELEMENTS_PER_MB // self.head.vocab_size)

    def train(self, mode: bool = True) -> "Scorer":
        """Training mode for the few modules that need it."""
        set_mode(self, mode)
        return self

    def forward(self, micro: MicroBatch) -> Tensor:
        """Log-probs [B, T] under the sampling distribution; 0 on tokens that are not trained.

        Rows are flattened (no padding, each prompt once) where the model supports it and it saves enough tokens. Else
        they are padded on the right and need no attention mask, because attention is causal; where position ids start
        again within a row, transformers masks the earlier texts (grpo/sft/packing.py checks that it does).
        """
        # the M tokens that are trained
        kept = micro.trained.reshape(-1).nonzero()[:, 0] if micro.trained_index is None else micro.trained_index  # [M]
        targets = micro.target_ids.reshape(-1)[kept]  # [M]
        support = None if micro.support is None else micro.support.flatten(0, 1)[kept]  # [M, K]
        # the forward: a flat row or padded rows, then the head at the M positions
        flat = self._worth_flattening(micro)
        inputs, where = self._row_inputs(micro, kept) if flat is None else self._flat_inputs(flat, kept)
        with arithmetic(self.cfg.dtype, micro.input_ids.device):
            if self.head.usable:
                hidden = self.head.body()(**inputs).last_hidden_state
                values, hits, entropy = self._in_blocks(hidden[where], targets, support, micro.head_blocks)
            else:
                logits = self.model(**inputs).logits[where]
                values, hits, entropy = self._pick(logits, targets, support, self.measures_entropy)
        # back to [B, T]
        if self.counts_hits:
            self.hits = torch.zeros_like(micro.trained).view(-1).index_copy(0, kept, hits).view_as(micro.trained)
        zeros = torch.zeros(micro.trained.numel(), dtype=torch.float32, device=values.device)
        if self.measures_entropy:
            self.entropy = zeros.index_copy(0, kept, entropy).view(micro.trained.shape)
        return zeros.index_copy(0, kept, values).view(micro.trained.shape)

    def _row_inputs(self, micro: MicroBatch, kept: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """Padded rows, and where the M targets are predicted in them: the simple path."""
        inputs = {"input_ids": micro.input_ids, **accepted(self.model, {"use_cache": False})}
        if micro.position_ids is not None:
            inputs["position_ids"] = micro.position_ids
        return inputs, (kept // micro.trained.shape[1], micro.positions.reshape(-1)[kept])

    def _worth_flattening(self, micro: MicroBatch) -> Flat | None:
        """The flat form, where it saves enough tokens to pay for several attention calls per prompt; else None."""
        if not self.shares_prompts or micro.position_ids is not None:
            return None
        flat = micro.flat or flatten_micro_batch(micro)
        return flat if flat.input_ids.numel() <= FLAT_BELOW * micro.input_ids.numel() else None

    def _flat_inputs(self, flat: Flat, kept: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """The flat row, and where the M targets are predicted in it."""
        where = flat.positions.reshape(-1)[kept]
        return {"input_ids": flat.input_ids, **flat.shared_prompts.inputs()}, (torch.zeros_like(where), where)

    def _in_blocks(self, hidden: Tensor, targets: Tensor, support: Tensor | None, num_blocks: int) -> Picked:
        """Hidden states [M, H] -> log-probs, hits and entropies, as `_pick` returns them.

        num_blocks: blocks to run at least (see MicroBatch.head_blocks).
        """
        # one plain matrix: the fused head
        matrix = None if self.sharded or support is not None else self.head.matrix()
        if matrix is not None:
            head, cfg = self.head, self.cfg
            how = (head.scale, cfg.temperature, cfg.logit_clamp, self.block_tokens, head.num_tokens)
            low = hidden.to(arithmetic_dtype(cfg.dtype))
            values, hits, entropy = HeadLogprobs.apply(low, matrix, targets, *how, self.measures_entropy)
            return values, hits if self.counts_hits else hits[:0], entropy
        # any other head: blocks through autograd
        num_blocks = max(num_blocks, math.ceil(len(targets) / self.block_tokens), 1)
        recompute = num_blocks > 1 and torch.is_grad_enabled()
        parts = []
        for i in range(0, num_blocks * self.block_tokens, self.block_tokens):
            block = slice(i, i + self.block_tokens)
            inputs = (hidden[block], targets[block], None if support is None else support[block], self.measures_entropy)
            if recompute:
                parts.append(checkpoint(self._block, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._block(*inputs))
        values, hits, entropy = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(hits), torch.cat(entropy)

    def _block(self, hidden: Tensor, targets: Tensor, support: Tensor | None, with_entropy: bool) -> Picked:
        return self._pick(self.head.logits(hidden), targets, support, with_entropy)

    def _pick(self, logits: Tensor, targets: Tensor, support: Tensor | None, with_entropy: bool) -> Picked:
        """logits [M, V], targets [M] -> log-probs and entropies, over the support where given; hits, over all ids."""
        bounded, _ = bounded_logits(
            logits[:, : self.head.num_tokens].float(), self.cfg.temperature, self.cfg.logit_clamp
        )
        chosen = bounded.gather(-1, targets[:, None])[:, 0]
        hits = (chosen >= bounded.amax(-1)).detach() if self.counts_hits else torch.zeros(0, dtype=torch.bool)
        if support is not None:
            bounded = bounded.gather(-1, support.clamp(min=0)).masked_fill(support < 0, -torch.inf)
        entropy = entropy_of(bounded) if with_entropy else bounded.new_zeros(0)
        return chosen - torch.logsumexp(bounded, dim=-1), hits, entropy
