"""The engine of a run: the native one, or vLLM's servers (setting `rollout_engine`)."""

from collections.abc import Iterable
from functools import partial

from transformers import PreTrainedTokenizerBase

from grpo.config.settings import Config
from grpo.rollout import Engine
from grpo.rollout.engine import NativeEngine
from grpo.runtime.distributed import World
from grpo.runtime.signals import Stopping
from grpo.training.load_policy import load_rollout_model
from grpo.training.metrics import declare
from grpo.training.policy import Policy
from grpo.training.rollout_metrics import BEHIND
from grpo.training.score_rows import scorer_of


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
    score = scorer_of(policy.backend.score, world.device, policy.scorer.shares_prompts, policy.scorer.block_tokens)
    model, num_tokens = policy.model, policy.num_tokens
    engine = open_vllm(cfg, world, model, stop_ids, num_tokens, tokenizer, score, stopping, merged)
    policy.gap_limit = engine.gap_limit
    if engine.ahead is not None:
        policy.extras[AHEAD] = engine.ahead
        declare(maxima=(BEHIND,))
    return engine
