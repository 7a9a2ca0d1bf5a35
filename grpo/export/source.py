"""The checkpoint that is exported: its weights in fp32, an adapter merged into its base."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.checkpoints.card import without_paths
from grpo.checkpoints.resume import read_state
from grpo.data.recipe import Recipe, load_recipe
from grpo.errors import UserError
from grpo.export.serving_template import response_template, served_recipe, serving_template
from grpo.models.checks import check_vocabulary, load_model, stop_token_ids
from grpo.models.loading import load_tokenizer, resolve
from grpo.models.lora_checks import is_adapter

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """A verified checkpoint. Its parts are read on first use; reading raises UserError."""

    folder: Path
    for_serving: bool = False  # the chat template holds the recipe (serving_template.py)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter instead of whole weights."""
        return is_adapter(self.folder)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return read_state(self.folder)

    @property
    def raw_config(self) -> dict[str, Any]:
        """The settings of the run, with this machine's paths."""
        return dict(self._state["config"])

    @cached_property
    def state(self) -> dict[str, Any]:
        """Counters and settings for the exported folder, without paths of this machine."""
        return {"counters": dataclasses.asdict(self._state["counters"]), "config": without_paths(self.raw_config)}

    @cached_property
    def _own_recipe(self) -> Recipe:
        return load_recipe(self.folder / "trainer" / "recipe.json")

    @property
    def recipe(self) -> Recipe:
        """How prompts are built, with the chat template of `tokenizer`."""
        return served_recipe(self._own_recipe) if self.for_serving else self._own_recipe

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template of the run, or with the one for servers."""
        tokenizer = load_tokenizer(str(self.folder))
        if self.for_serving:
            tokenizer.chat_template = serving_template(self._own_recipe, tokenizer)
            tokenizer.response_template = response_template(self._own_recipe, tokenizer)
        return tokenizer

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the whole model, read without its weights."""
        folder = str(self.folder)
        if self.is_adapter:
            from grpo.models.lora_files import base_of

            folder = base_of(self.folder)
        try:
            return AutoConfig.from_pretrained(resolve(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint: the config of {folder!r} could not be loaded: {reason}") from None

    @property
    def step(self) -> int:
        """The number of completed training steps."""
        return int(self._state["counters"].step)

    def model(self) -> PreTrainedModel:
        """A new copy of the whole model, fp32 on CPU; an adapter is merged into its base."""
        if self.is_adapter:
            from grpo.models.lora import merged, open_adapter  # late: peft is needed for adapters alone

            model = merged(open_adapter(self.folder, CPU))
        else:
            model = load_model(str(self.folder), CPU)
        check_vocabulary(model, self.tokenizer)
        stop_token_ids(model, self.tokenizer, self.recipe.end_of_turn)  # an adapter's base does not name the last
        for name, tensor in model.state_dict().items():
            if not math.isfinite(float(tensor.abs().max())):  # a maximum is NaN where any value is
                raise UserError(f"checkpoint: {name} of {self.folder} holds NaN or Inf. Choose an earlier checkpoint.")
        return model
