"""Load the policy of a run, from its base model or from a checkpoint, and the model that the engine samples with."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from grpo.config.names import model_name
from grpo.config.settings import Config, shards_weights
from grpo.errors import UserError
from grpo.models.bf16_numbers import rounded_away
from grpo.models.checks import load_model
from grpo.models.offload import check_device
from grpo.runtime.distributed import World
from grpo.training.policy import Policy
from grpo.training.reference_renewal import keep_reference


def load_policy(cfg: Config, world: World, checkpoint: Path | None = None, kind: type[Policy] = Policy) -> Policy:
    """Load the model to be trained, and the base model as the reference when beta > 0. Raises UserError."""
    check_device(cfg, world.device)
    if cfg.lora_dropout and kind is Policy:
        raise UserError(
            f"lora_dropout: must be 0 in GRPO, got {cfg.lora_dropout:g}: what is trained must be the distribution that "
            "was sampled. Set it in the sft section alone."
        )
    reference = None
    if cfg.beta > 0 and not cfg.lora_r:
        reference = load_model(model_name(cfg), torch.device("cpu") if cfg.reference_offload else world.device)
    model = load_trained(cfg, world.device, checkpoint)
    unseen = rounded_away(model) if cfg.dtype == "bf16" and not cfg.lora_r else None
    policy = kind(cfg, world, model, reference)
    policy.unseen = unseen
    if cfg.reference_sync_steps:
        keep_reference(policy)
    return policy


def load_trained(cfg: Config, device: torch.device, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model to be trained, with its adapter where it has one. checkpoint: None for a new run. Raises UserError."""
    if cfg.lora_r:
        from grpo.models.lora import load_lora  # late: peft takes seconds

        return load_lora(cfg, device, checkpoint)
    return load_model(str(checkpoint or model_name(cfg)), device)


def load_rollout_model(policy: Policy) -> PreTrainedModel:
    """The model that the engine samples with: the policy's own, or a whole copy where its weights are sharded."""
    if not shards_weights(policy.cfg):
        return policy.model
    # requires_grad stays on although no gradient is computed: autocast caches bf16 casts only of such weights.
    return load_trained(policy.cfg, policy.world.device)
