"""Attention without padding, where each prompt is computed once for all its completions.

A `PromptGroup` is a prompt and the completions that continue it. All texts stand in one flat row of tokens [1, S]:

    common prefix | prompt A | prompt B | completions of A | completions of B

Linear layers and norms work on each token alone; only attention needs to know which tokens belong together:

    common prefix      what all prompts begin with, such as a system prompt: sees itself, causally
    prompt token       sees the prefix, and its prompt up to itself
    completion token   sees the prefix, its whole prompt, and its own completion up to itself

A model of transformers that calls the registered attention interface calls `dispatch`. It computes this attention where
a `SharedPrompts` is among the arguments of the model's forward, and is transformers' own SDPA otherwise. The arithmetic
is in fused_attention.py, or in branch_attention.py where no fused kernel fits. The simple path is one padded row per
completion through the model's own forward; `can_share` compares the two on a few tokens of the model when it is loaded.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo.forward.arguments import trial_ids
from grpo.forward.attention_parts import Part, behind, offsets_of, parts_of, positions_of, windowed_parts
from grpo.forward.branch_attention import Run, attend_by_branches, cut_runs, padded_arrays
from grpo.forward.fused_attention import FusedAttention, fused_kernel

NAME = "grpo_shared_prompts"
MAX_DIFFERENCE = {False: 1e-4, True: 5e-2}  # relative, to the model's own hidden states; True: under bf16 autocast


@dataclass(frozen=True)
class PromptGroup:
    """Tokens of a prompt after the common prefix, and of the completions that continue it."""

    prompt_length: int
    completion_lengths: tuple[int, ...] = ()


class SharedPrompts:
    """The prompt groups of one forward, and the index tensors that attention needs.

    `dispatch` calls `attend` of whatever is passed to the model as `shared_prompts`.
    """

    def __init__(self, groups: Sequence[PromptGroup], device: torch.device, prefix_length: int = 0):
        """prefix_length: tokens at the start of the flat row that all prompts begin with."""
        self.groups = tuple(groups)
        self.prefix_length = prefix_length
        self.device = device
        self.calls = 0  # of `attend`; still 0 after a forward: the model does not use the attention interface
        self.keys_values: dict[int, tuple[Tensor, Tensor]] | None = None  # layer -> [1, kvh, S, d] each; {}: collect
        self.longest = prefix_length + max(g.prompt_length + max(g.completion_lengths, default=0) for g in groups)
        self.prompts = behind(prefix_length, [group.prompt_length for group in groups])  # slices of the flat row
        self.completions = behind(self.prompts[-1].stop, [sum(group.completion_lengths) for group in groups])
        self._lengths = [group.prompt_length for group in groups], [group.completion_lengths for group in groups]
        self._parts = parts_of(prefix_length, *self._lengths)
        self.windowed_parts = cache(partial(windowed_parts, prefix_length, *self._lengths))  # of a window, on CPU
        self._indices: list[Tensor] | None = None

    @property
    def position_ids(self) -> Tensor:
        """[1, S]: a prompt continues the common prefix, a completion continues its prompt."""
        return self.copy_indices()[0]

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of fused attention."""
        if self.device.type == "cpu":
            return self._parts
        offsets = self.copy_indices()[1 : 1 + len(self._parts)]
        return [replace(part, offsets=both.int()) for part, both in zip(self._parts, offsets, strict=True)]

    @cached_property
    def runs(self) -> list[list[Run]]:
        """The completions of each group, for branch_attention.py."""
        tensors: Iterator[Tensor] = iter(self.copy_indices()[1 + len(self._parts) :])
        return [
            [Run.of(where, next(tensors), next(tensors), next(tensors)) for where, _ in runs] for runs in self._runs
        ]

    @cached_property
    def _runs(self) -> list[list[tuple[slice, tuple[int, ...]]]]:
        return [
            cut_runs(where.start, group.completion_lengths)
            for where, group in zip(self.completions, self.groups, strict=True)
        ]

    def copy_indices(self) -> list[Tensor]:
        """Copy the position ids and the index tensors of `parts` and `runs` to the device, once: all int64.

        It is one copy for all, and a device sync. Called when a micro-batch is made, it does not stall an update.
        """
        if self._indices is not None:
            return self._indices
        arrays = [positions_of(self.prefix_length, *self._lengths)[None]]
        arrays += [offsets_of(part) for part in self._parts]
        arrays += [array for runs in self._runs for _, lengths in runs for array in padded_arrays(lengths)]
        values = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64)).to(self.device)
        split = values.split([array.size for array in arrays])
        self._indices = [part.view(array.shape) for part, array in zip(split, arrays, strict=True)]
        return self._indices

    def inputs(self) -> dict[str, Any]:
        """Arguments of a model's forward beside input_ids."""
        # transformers builds no mask of its own where it is given one with four axes
        placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return {
            "position_ids": self.position_ids,
            "attention_mask": placeholder,
            "use_cache": False,
            "shared_prompts": self,
        }

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, H, S, d], key and value [1, kvh, S, d] -> [1, S, H, d]."""
        self.calls += 1
        if torch.is_autocast_enabled(query.device.type):  # as SDPA casts, and so that the backward has this type too
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self.keys_values is not None:
            self.keys_values[layer] = (key, value)
        hides = window is not None and window < self.longest
        width = max(query.shape[-1], value.shape[-1])
        kernel = fused_kernel(query.device, query.dtype, query.shape[1], key.shape[1], width, hides)
        if kernel is not None:
            # values as wide as keys: zeros change neither scores nor the columns that are kept
            padded = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
            parts = self.windowed_parts(window) if hides else self.parts
            out = FusedAttention.apply(*padded, parts, kernel, scale)
            return out[..., : value.shape[-1]].transpose(1, 2)
        return attend_by_branches(query, key, value, self.prefix_length, self.prompts, self.runs, scale, window)


def dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shared_prompts: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a model: `shared_prompts.attend` where it is given, else transformers' SDPA.

    Raises NotImplementedError for attention that `attend` does not compute, such as a soft cap on scores.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prompts.attend(module.layer_idx, query, key, value, scale, sliding_window), None


AttentionInterface.register(NAME, dispatch)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_shared_attention(model: PreTrainedModel) -> None:
    """Make a model that uses transformers' SDPA call `dispatch`; any other is left as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


@torch.no_grad()
def can_share(model: PreTrainedModel, body: nn.Module) -> bool:
    """Compare hidden states of a few tokens with shared prompts and as rows; a model that differs gets a warning.

    Call it on every rank: a sharded model's forward is a collective.
    """
    ids = trial_ids(9, int(model.config.get_text_config().vocab_size), model.device)
    prompt, completions = ids[:4], (ids[4:7], ids[5:9])
    expected = [
        body(input_ids=torch.cat([prompt, completion])[None], use_cache=False).last_hidden_state[0, 4:]
        for completion in completions
    ]
    shared_prompts = SharedPrompts([PromptGroup(4, (3, 4))], model.device)
    problem = ""
    try:
        flat = torch.cat([prompt, *completions])[None]
        found = body(input_ids=flat, **shared_prompts.inputs()).last_hidden_state[0, 4:].split((3, 4))
        if shared_prompts.calls == 0:
            problem = "its attention is not transformers' attention interface"
        else:
            size = max(float(hidden.abs().amax()) for hidden in expected)
            gap = max(float((a - b).abs().amax()) for a, b in zip(expected, found, strict=True))
            limit = MAX_DIFFERENCE[torch.is_autocast_enabled(model.device.type)]
            if math.isfinite(size) and not gap <= limit * max(size, 1.0):
                problem = f"hidden states differ by {gap / max(size, 1.0):.1e}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture raises for arguments that it does not expect
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(
            f"{type(model).__name__}: each prompt is computed anew for each of its completions, and rows are padded "
            f"({problem[:200]}): slower, same numbers.",
            stacklevel=2,
        )
    return not problem
