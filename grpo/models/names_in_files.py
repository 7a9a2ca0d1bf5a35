"""A model's weights as its files name them, one at a time.

transformers keeps some weights in another form than their files: the experts of a layer as one 3-D parameter, or under
another name. `save_pretrained` turns all of them back at once; whoever reads weights one at a time needs them so, too.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

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
        saved = model.state_dict().keys()
        self.buffers = {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
        weights = {name.replace(".base_layer.", "."): _on_meta(p) for name, p in model.named_parameters()}
        whole = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
        whole |= {name: _on_meta(buffer) for name, buffer in self.buffers.items()}
        try:
            in_files = revert_weight_conversion(model, dict(whole))
            self.converted = whole.keys() - {name for name, value in in_files.items() if value is whole.get(name)}
            alone = [item for name in self.converted for item in self._alone(name, whole[name]).items()]
        except Exception as error:  # what a conversion raises that lacks its other weights
            raise self._refusal(f"{type(error).__name__}: {error}") from None
        expected = {name: value.shape for name, value in in_files.items() if value is not whole.get(name)}
        if len(alone) != len(expected) or {name: value.shape for name, value in alone} != expected:
            raise self._refusal(min(self.converted))

    def _alone(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return revert_weight_conversion(self.model, {name: tensor})

    def _refusal(self, example: str) -> UserError:
        return UserError(
            f"rollout_engine: weights of {type(self.model).__name__} cannot be turned one at a time into those of its "
            f"files ({' '.join(example.split())[:200]}), as vllm needs them. Use --rollout_engine native."
        )

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, in their order, and behind them what files hold beside weights, such as a router's bias."""
        for name, tensor in chain(weights, self.buffers.items()):
            if name in self.converted:
                yield from self._alone(name, tensor.detach()).items()
            else:
                yield name, tensor


def _on_meta(tensor: Tensor) -> Tensor:
    """One that only has a shape, that of the whole where ZeRO has sharded it."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
