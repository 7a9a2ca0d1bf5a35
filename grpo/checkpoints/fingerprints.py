"""What identifies a run beside its settings: base model, data, chat template, rewards. A resume needs the same ones."""

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from grpo.checkpoints.manifest import tree_sha256
from grpo.config.names import find_path
from grpo.config.settings import Config, scales_advantages
from grpo.data.questions import Questions
from grpo.models.hub import commit_of
from grpo.models.lora_checks import check_adapter, is_adapter
from grpo.rewards import Reward

INFORMATIVE = {"versions", "model_commit"}


def fingerprints(
    cfg: Config, questions: Questions, rewards: Sequence[Reward], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Hashes of what decides the trajectory. A resume compares them, but for INFORMATIVE ones.

    model_commit: of a model on the hub. Its main branch may have moved since.
    """
    assert cfg.model is not None
    path = find_path(cfg.model)
    adapter_base = ""
    if path and is_adapter(path):  # the adapter's base model is part of the fingerprint
        base = find_path(str(check_adapter(path)["base_model_name_or_path"]))
        adapter_base = f" on {tree_sha256(base)}" if base else ""
    rows = hashlib.sha256()
    for prompt in questions.items:
        rows.update(json.dumps([prompt.token_ids, prompt.columns], default=str, sort_keys=True).encode())
    facts: dict[str, Any] = (
        {} if scales_advantages(cfg) or not rewards else {"clip_of_unscaled_advantages": "none"}
    )  # older runs: 10
    if any("trainer_state" in reward.takes for reward in rewards):  # older runs did not pass it
        by_length = any("max_steps" in reward.source for reward in rewards)
        facts["reward_arguments"] = f"trainer_state of {cfg.max_steps}, {cfg.epoch}" if by_length else "trainer_state"
    if path is None:
        facts["model_commit"] = commit_of(Path(getattr(tokenizer, "name_or_path", "")))
    return facts | {
        "base_model": tree_sha256(path) + adapter_base if path else cfg.model,
        "data": rows.hexdigest(),
        "chat_template": _sha256(str(getattr(tokenizer, "chat_template", None))),
        "reward_source": _sha256("".join(reward.source for reward in rewards)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
