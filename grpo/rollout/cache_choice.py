"""Which cache a model can use: each kind is tried on a few tokens when an engine is made."""

import warnings

import numpy as np
import torch
from torch import Tensor

from grpo.forward.arguments import accepted, trial_ids
from grpo.forward.logprobs import Head
from grpo.forward.shared_attention import MAX_DIFFERENCE
from grpo.rollout import Request
from grpo.rollout.caches import CacheKind, open_cache
from grpo.rollout.fast_llama import FastLlama
from grpo.rollout.shared_cache import SharedCache
from grpo.runtime.out_of_memory import ran_out

SLOWER = {  # what a notice says of a kind
    "equal_lengths": "only rows whose prompts have one length decode together",
    "recompute": "each token computes its whole row again",
}


@torch.no_grad()
def choose_cache(head: Head, shares_prompts: bool) -> CacheKind:
    """The fastest kind whose logits are those of the model's forward of whole rows; a slow one gets a warning."""
    problem = ""
    kinds: tuple[CacheKind, ...] = ("shared", "padded", "equal_lengths")
    for kind in kinds if shares_prompts else kinds[1:]:
        try:
            difference = _difference(kind, head)
        except Exception as error:  # whatever an architecture raises for a cache that it does not expect
            if ran_out(error):
                raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not difference > MAX_DIFFERENCE[torch.is_autocast_enabled(head.model.device.type)]:
            break
        problem = f"logits differ by {difference:.1e}"
    else:
        kind = "recompute"
    if kind in SLOWER:
        warnings.warn(
            f"{type(head.model).__name__}: {SLOWER[kind]} ({problem[:200]}): slower, same numbers.", stacklevel=2
        )
    return kind


def _difference(kind: CacheKind, head: Head) -> float:
    """Largest difference of a cache's logits to whole rows', relative; two rows, and one after the other has left."""
    lengths = (4, 7) if kind in ("shared", "padded") else (7, 7)
    new = 2
    both = trial_ids(2 * (max(lengths) + new), head.vocab_size).view(-1, 2).T
    row = [ids[: length + new].to(head.model.device) for ids, length in zip(both, lengths, strict=True)]
    # whole rows, in one batch: what stands behind the shorter one does not change it (models/trial.py)
    arguments = accepted(head.model, {"use_cache": False})
    whole = head.model(input_ids=both.to(head.model.device), **arguments).logits.float()
    expected = [whole[i, length - 1 : length + new] for i, length in enumerate(lengths)]
    requests = [Request(i, i, 0, tuple(ids[:n].tolist())) for i, (ids, n) in enumerate(zip(row, lengths, strict=True))]
    cache = open_cache(kind, head, requests, new)
    # the first token and the second of both rows; the others of the first row
    found = [cache.join(requests, last=True), cache.decode(torch.stack([ids[-new] for ids in row]), Tensor.float)]
    cache.keep(np.array([0]), last=True)
    found += [cache.decode(row[0][i : i + 1], Tensor.float) for i in range(lengths[0] + 1, lengths[0] + new)]
    size = max(float(logits.abs().amax()) for logits in expected)
    gaps = [expected[i][step] - logits[i].float() for step, logits in enumerate(found) for i in range(len(logits))]
    return float(torch.stack(gaps).abs().amax()) / max(size, 1.0)


def checked_fast_llama(head: Head) -> FastLlama | None:
    """The fast form of the model's body, compared with the model's own forward; None: it has none, or they differ."""
    fast_llama = FastLlama.of(head.model, head.body())
    if fast_llama is None:
        return None
    requests = [Request(0, 0, 0, tuple(trial_ids(5, head.vocab_size).tolist()))]
    own = SharedCache(head, requests, 2)
    token = own.join(requests, last=True).argmax(-1)
    try:
        fast = SharedCache(head, requests, 2, fast_llama)
        fast.join(requests, last=True)
        expected, found = own.decode(token, Tensor.float), fast.decode(token, Tensor.float)
    except (AttributeError, TypeError, RuntimeError):  # its modules have other names or shapes
        return None
    size = float(expected.abs().amax().clamp(min=1.0))
    close = float((found - expected).abs().amax()) <= MAX_DIFFERENCE[torch.is_autocast_enabled(own.device.type)] * size
    return fast_llama if close or not bool(torch.isfinite(expected).all()) else None
