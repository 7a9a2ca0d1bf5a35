"""Head and log-softmax in one: hidden [M, H] -> log-probs [M], with one block of logits in memory at a time.

    logits = scale W h,  z = clamp(logits - mid-range) / T,  logp = z_target - logsumexp(z)
    dlogp/dz = onehot(target) - softmax(z)

and, where it is asked for, the entropy of the same distribution, p = softmax(z):

    H = -sum_v p_v log p_v,  dH/dz_v = -p_v (log p_v + H)

The backward computes a block's logits again and adds its part to one gradient of W in place, so that neither the logits
nor a [V, H] gradient per block are kept. It serves heads that are one plain matrix on this process. The simple path is
`Scorer._block` in logprobs.py, through autograd; other heads use it, and tests compare the two.
"""

import torch
from torch import Tensor, nn

from grpo.forward.precision import host_reads_are_free

ROWS_IN_CACHE = 2**20  # logits processed at once on CPU, so that they stay in the processor's cache


class HeadLogprobs(torch.autograd.Function):
    """hidden [M, H], weight [V, H], targets [M] -> log-probs [M] fp32, and whether the target is likeliest [M] bool.

    The third output is the entropy in nats, [M] fp32, or with_entropy False [0]. num_tokens: the rows of the weight
    that are tokens, the first ones.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, temperature, clamp, block_rows, num_tokens, with_entropy=False):
        ctx.settings = (scale, temperature, clamp, block_rows, num_tokens)
        ctx.set_materialize_grads(False)  # an output without gradient costs nothing in the backward
        logprobs = torch.empty(len(hidden), device=hidden.device)
        lse = torch.empty_like(logprobs)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        entropy = torch.empty(len(hidden) if with_entropy else 0, device=hidden.device)
        saved_logits = limit = None
        low_weight = weight[:num_tokens].to(hidden.dtype)
        for block in _blocks(len(hidden), block_rows):
            logits = _logits(hidden[block], low_weight, scale)
            limit = _bound(logits, clamp)
            if len(hidden) <= block_rows:
                saved_logits = logits  # the only block: the backward need not compute it again
            for rows in _in_cache(logits, block.start):
                z = logits[rows.start - block.start : rows.stop - block.start]
                if temperature != 1.0:
                    z = z / temperature
                # log-softmax at the target
                chosen = z.gather(-1, targets[rows, None])[:, 0]
                top = z.amax(-1)
                hits[rows] = chosen >= top
                below = z - top[:, None]
                if with_entropy:  # log sum e^b - sum(b e^b) / sum e^b, b = z - max z
                    powers = below.exp()
                    total = powers.sum(-1)
                    entropy[rows] = total.log() - powers.mul_(below).sum(-1) / total
                else:
                    total = below.exp_().sum(-1)
                lse[rows] = total.log_().add_(top)
                logprobs[rows] = chosen - lse[rows]
        saved_limit = limit if saved_logits is not None else None
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, saved_logits, saved_limit)
        ctx.mark_non_differentiable(hits)
        return logprobs, hits, entropy

    @staticmethod
    def backward(ctx, gradient, _, entropy_gradient):
        hidden, weight, targets, lse, entropy, saved_logits, limit = ctx.saved_tensors
        gradient = torch.zeros_like(lse) if gradient is None else gradient
        scale, temperature, clamp, block_rows, num_tokens = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        low_weight = weight[:num_tokens].to(hidden.dtype)
        for block in _blocks(len(hidden), block_rows):
            # the block's logits again
            logits = _logits(hidden[block], low_weight, scale) if saved_logits is None else saved_logits.clone()
            if saved_logits is None:
                limit = _bound(logits, clamp)
            clamped = None if limit is None else (logits >= limit).logical_or_(logits <= -limit)
            # in place: logits -> gradient * (onehot(target) - softmax), and that of the entropy
            for rows in _in_cache(logits, block.start):
                z = logits[rows.start - block.start : rows.stop - block.start]
                if temperature != 1.0:
                    z.div_(temperature)
                z.sub_(lse[rows, None])
                factor = -gradient[rows, None]
                if entropy_gradient is not None:
                    factor = (z + entropy[rows, None]).mul_(-entropy_gradient[rows, None]).add_(factor)
                z.exp_().mul_(factor)
                z.scatter_add_(-1, targets[rows, None], gradient[rows, None])
            # through clamp, temperature and scale
            if clamped is not None:
                logits.masked_fill_(clamped, 0.0)
            if scale != temperature:
                logits.mul_(scale / temperature)
            # to hidden states and weight
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[block] = grad_logits @ low_weight
            if grad_weight is not None and grad_logits.dtype == torch.float32:
                grad_weight[:num_tokens].addmm_(grad_logits.t(), hidden[block])
            elif grad_weight is not None:
                grad_weight[:num_tokens].add_(grad_logits.t() @ hidden[block])
        return grad_hidden, grad_weight, *[None] * 7


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(i, min(total, i + size)) for i in range(0, total, size)]


def _in_cache(logits: Tensor, offset: int) -> list[slice]:
    size = max(1, ROWS_IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return [slice(offset + part.start, offset + part.stop) for part in _blocks(len(logits), size)]


def _logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """fp32 [M, V]; the product in the precision of both."""
    logits = (hidden @ weight.t()).float()
    return logits.mul_(scale) if scale != 1.0 else logits


def _bound(logits: Tensor, clamp: float) -> Tensor | None:
    """Centre each row wider than 2 * clamp on its mid-range and clamp it, in place.

    Returns the limit of each row, [M, 1], inf where the row was not clamped; None: no row was. On a GPU it is never
    None: to find out whether any row is wide would be a device sync, which costs more than the clamp.
    """
    low, high = torch.aminmax(logits, dim=-1, keepdim=True)
    wide = high - low > 2 * clamp
    if host_reads_are_free(logits.device) and not bool(wide.any()):
        return None
    limit = torch.where(wide, clamp, torch.inf)
    logits.sub_(torch.where(wide, (high + low) / 2, 0.0)).clamp_(-limit, limit)
    return limit


def plain_matrix(head: nn.Module) -> Tensor | None:
    """The weight of a head that is one matrix without bias or hooks; else None."""
    if type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks:
        return head.weight
    return None
