"""A model's weights as its files name them, one at a time.

transformers keeps some weights in another form than their files: the experts of a layer as one 3-D parameter, or under
another name. `save_pretrained` turns all of them back at once; whoever reads weights one at a time needs them so, too.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from grpo.errors import UserError


class NamesInFiles:
    """Calling it turns (name in memory, tensor) into (name in files, tensor), one or more of each."""

    def __init__(self, model: PreTrainedModel):
        """Raises UserError for a model with a weight in files that is made of several in memory."""
        self.model = model
        whole = {
            name.replace(".base_layer.", "."): torch.empty(
                getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta"
            )
            for name, parameter in model.named_parameters()
            if ".lora_" not in name
        }
        in_files = revert_weight_conversion(model, dict(whole))
        self.converted = whole.keys() - {name for name, value in in_files.items() if value is whole.get(name)}
        alone: set[str] = whole.keys() - self.converted
        try:
            for name in self.converted:
                alone |= revert_weight_conversion(model, {name: whole[name]}).keys()
        except Exception as error:  # what a conversion raises that lacks its other weights
            raise self._refusal(f"{name}: {type(error).__name__}") from None
        if alone != in_files.keys():
            raise self._refusal(str(min(alone ^ in_files.keys())))

    def _refusal(self, example: str) -> UserError:
        return UserError(
            f"rollout_engine: {type(self.model).__name__} has weights in files that are made of several in memory "
            f"({example[:200]}); vllm gets weights one at a time. Use rollout_engine native."
        )

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, in their order."""
        for name, tensor in weights:
            if name in self.converted:
                yield from revert_weight_conversion(self.model, {name: tensor.detach()}).items()
            else:
                yield name, tensor
