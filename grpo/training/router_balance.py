"""The load-balancing loss of mixtures of experts, row by row, so that it does not depend on how rows are cut.

For row n with trained tokens t = 1 to C_n, MoE layer l, experts e = 1 to E of which k are used, router logits z:

    p_nlte = softmax(z_nlt)_e                            f_nle = number of t with e among the k largest logits / C_n
    a_nt   = mean over l of  E * sum_e f_nle * p_nlte    added to the token's loss, times router_aux_loss_coef

The mean of a_nt over a row is E * sum_e f_e * P_e, the loss of Switch Transformer (arXiv 2101.03961, eq. 4 to 6), over
one sequence as in DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20); balanced routing gives k. f has no gradient. As every
other part of a token's loss, a_nt is multiplied by the token's weight (losses.py), whose denominator is global.

Differs from the papers and from transformers: there f and P are means over all tokens of a batch, and the loss is their
product, so the gradient depends on which rows share a micro-batch, and on the number of processes. transformers also
averages f and P over the layers before it multiplies them. Prompts are not counted: their tokens are not trained.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.forward.precision import arithmetic
from grpo.training.metrics import declare
from grpo.types import MicroBatch

METRIC = "router_aux"

declare(means=(METRIC,))


class RouterBalance:
    """Records the router logits of a scorer's forwards with gradient."""

    def __init__(self, scorer: Scorer):
        """Raises UserError for a model without router logits."""
        self.scorer = scorer
        self.logits: list[Tensor] = []  # of the last forward, one [tokens, E] for each MoE layer
        self.recording = False
        model: Any = scorer.model
        body = scorer.head.body()
        body.register_forward_pre_hook(self._ask, with_kwargs=True)
        body.register_forward_hook(self._record)
        config = model.config.get_text_config()
        top_k = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
        self.top_k: int = top_k if isinstance(top_k, int) else 0
        if not self.top_k or "output_router_logits" not in inspect.signature(type(model).forward).parameters:
            raise self._refusal("it returns none")
        self._try(body)

    def _try(self, body: nn.Module) -> None:
        """A forward of a few tokens. Raises UserError when it gives no router logits of a known form."""
        ids = torch.arange(8, device=self.scorer.model.device)[None]
        self.recording = True
        try:
            with torch.no_grad(), arithmetic(self.scorer.cfg.dtype, ids.device):
                body(input_ids=ids, use_cache=False)
        finally:
            self.recording = False
        shapes = [list(logits.shape) for logits in self.logits]
        if not shapes or any(len(shape) != 2 or shape[0] != ids.numel() or shape[1] < self.top_k for shape in shapes):
            raise self._refusal(f"for {ids.numel()} tokens it returns {shapes[:2] or 'none'}")
        self.logits = []

    def _refusal(self, reason: str) -> UserError:
        name = type(self.scorer.model).__name__
        return UserError(
            f"router_aux_loss_coef: {name} has no router logits to balance ({reason}). Set it to 0, or use a mixture "
            "of experts that transformers can balance, such as Qwen3-MoE."
        )

    def _ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = self.recording or torch.is_grad_enabled()
        return (args, {**kwargs, "output_router_logits": True}) if wanted else None

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording or torch.is_grad_enabled():
            logits = getattr(output, "router_logits", None) or ()
            self.logits = [layer.flatten(0, -2) for layer in logits if layer is not None and layer.dim() > 1]

    def add(self, token_loss: Tensor, micro: MicroBatch, means: dict[str, Tensor]) -> Tensor:
        """token_loss [B, T], weighted, plus the weighted balancing loss of the micro-batch that was scored last."""
        assert micro.weights is not None
        values = self._of_tokens(micro)
        means[METRIC] = values.detach()
        return token_loss + self.scorer.cfg.router_aux_loss_coef * values * micro.weights

    def _of_tokens(self, micro: MicroBatch) -> Tensor:
        """a [B, T], with gradient; 0 on tokens that are not trained."""
        trained = micro.trained
        kept = trained.reshape(-1).nonzero()[:, 0] if micro.trained_index is None else micro.trained_index  # [M]
        index = self._index(micro, kept)  # [M]
        rows = kept // trained.shape[1]  # [M] the row of each trained token
        counts = trained.sum(1).clamp(min=1)  # [B]
        layers, self.logits = self.logits, []
        values = torch.zeros(len(kept), device=kept.device)
        for logits in layers:
            p = logits[index].float().softmax(-1)  # [M, E]
            num_experts = p.shape[1]
            chosen = torch.zeros_like(p).scatter(1, p.topk(self.top_k, dim=-1).indices, 1.0)  # without gradient
            f = torch.zeros(len(trained), num_experts, device=p.device).index_add(0, rows, chosen) / counts[:, None]
            values = values + num_experts * (f[rows] * p).sum(-1) / len(layers)
        return torch.zeros(trained.numel(), device=values.device).index_copy(0, kept, values).view(trained.shape)

    def _index(self, micro: MicroBatch, kept: Tensor) -> Tensor:
        """[M] where the trained tokens are predicted, among the tokens of the forward: padded rows or a flat row."""
        flat = self.scorer._worth_flattening(micro)
        if flat is not None:
            return flat.positions.reshape(-1)[kept]
        return kept // micro.trained.shape[1] * micro.input_ids.shape[1] + micro.positions.reshape(-1)[kept]
