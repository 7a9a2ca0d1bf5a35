"""The engine of a run: the native one, or vLLM's servers (setting `rollout_engine`)."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.rollout import Engine
from grpo.rollout.engine import NativeEngine
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping
from grpo.training.collate import collate
from grpo.training.load_policy import load_rollout_model
from grpo.training.metrics import declare
from grpo.training.policy import Policy
from grpo.training.rollout_metrics import BEHIND
from grpo.types import Completion, TrainRow


def open_engine(
    cfg: Config,
    world: World,
    policy: Policy,
    stop_ids: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    stopping: Stopping,
) -> Engine:
    """Open the engine that the configuration names. Raises UserError."""
    if cfg.rollout_engine == "native":
        return NativeEngine.of(cfg, load_rollout_model(policy), stop_ids, policy.num_tokens, tokenizer)
    from grpo.rollout.vllm.ahead import NAME as AHEAD  # late: most runs need none of it
    from grpo.rollout.vllm.open import open_vllm

    merged = None
    if cfg.lora_r:
        from grpo.models.lora_merged import merged_weights  # late: peft takes seconds

        merged = partial(merged_weights, policy.model)
    score, model, num_tokens = scorer_of(policy), policy.model, policy.num_tokens
    engine = open_vllm(cfg, world, model, stop_ids, num_tokens, tokenizer, score, stopping, merged)
    if engine.ahead is not None:
        policy.extras[AHEAD] = engine.ahead
        declare(maxima=(BEHIND,))
    return engine


def scorer_of(policy: Policy) -> Callable[[tuple[int, ...], Completion], np.ndarray]:
    """Prompt ids and a completion -> [C] log-probs of the policy; a collective where its weights are sharded."""

    @torch.no_grad()
    def score(prompt_ids: tuple[int, ...], one: Completion) -> np.ndarray:
        row = TrainRow(0, prompt_ids, one.token_ids, one.sampler_logprobs, one.support, 0.0)
        micro = collate([row], {0: 0.0}, policy.world.device, policy.scorer.shares_prompts)
        return policy.backend.score(micro)[0].float().cpu().numpy()

    return score
