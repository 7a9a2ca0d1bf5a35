"""Attention without padding, where each prompt is computed once for all its completions.

A `PromptGroup` is a prompt and the completions that continue it. Groups stand one behind the other in a flat row of
tokens [1, S]. Linear layers and norms work on each token alone; only attention needs to know which tokens belong
together:

    common prefix      what all prompts begin with, such as a system prompt: sees itself, causally
    prompt token       sees the prefix, and its prompt up to itself
    completion token   sees the prefix, its whole prompt, and its own completion up to itself

A model of transformers that calls the registered attention interface calls `dispatch`. It computes this attention where
a `SharedPrompts` is among the arguments of the model's forward, and is transformers' own SDPA otherwise. The products
and their backward are in branch_attention.py. The simple path is one padded row per completion through the model's own
forward; `can_share` compares the two on a few tokens of the model when it is loaded.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo.forward.branch_attention import BranchAttention, PaddedIndex

NAME = "grpo_shared_prompts"
MAX_SCORES = 2**26  # attention scores in memory at once, unless a single head has more: 256 MB
SPARED_SCORES = 2**16  # padded scores per head that a separate run of shorter completions must save
MAX_DIFFERENCE = {False: 1e-4, True: 5e-2}  # relative, to the model's own hidden states; True: under bf16 autocast


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its completions in the flat row: the prompt's tokens after the common prefix, then completions."""

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...] = ()

    @property
    def prompt(self) -> slice:
        """Where the prompt's tokens after the common prefix stand in the flat row."""
        return slice(self.start, self.start + self.prompt_length)

    @property
    def completions(self) -> slice:
        """Where all completions stand in the flat row."""
        return slice(self.prompt.stop, self.prompt.stop + sum(self.completion_lengths))

    @property
    def runs(self) -> list[tuple[slice, tuple[int, ...]]]:
        """The completions in runs of similar lengths: where each run stands in the flat row, and its lengths.

        >>> [(run.start, run.stop, lengths) for run, lengths in PromptGroup(0, 4, (600, 500, 20, 9)).runs]
        [(4, 1104, (600, 500)), (1104, 1133, (20, 9))]
        """
        runs: list[list[int]] = []
        for i, length in enumerate(self.completion_lengths):
            longest = max(runs[-1]) if runs else 0
            spared = sum(longest**2 - other**2 for other in self.completion_lengths[i:])
            if not runs or (2 * length <= longest and spared >= SPARED_SCORES):
                runs.append([])
            runs[-1].append(length)
        ends = (self.completions.start + np.cumsum([sum(run) for run in runs])).tolist()
        return [(slice(end - sum(run), end), tuple(run)) for end, run in zip(ends, runs, strict=True)]


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
        self._indices: list[Tensor] | None = None

    @property
    def position_ids(self) -> Tensor:
        """[1, S]: a prompt continues the common prefix, a completion continues its prompt."""
        return self.copy_indices()[0]

    @cached_property
    def padded_index(self) -> list[list[tuple[slice, PaddedIndex]]]:
        """For each group and run: where the run stands in the flat row, and its completions as padded rows."""
        tensors = iter(self.copy_indices()[1:])
        return [
            [(run, PaddedIndex(next(tensors), next(tensors).bool(), next(tensors))) for run, _ in group.runs]
            for group in self.groups
        ]

    def copy_indices(self) -> list[Tensor]:
        """Copy `position_ids` and the tensors of every `PaddedIndex` to the device, once: all int64.

        It is one copy for all, and a device sync. Called when a micro-batch is made, it does not stall an update.
        """
        if self._indices is not None:
            return self._indices
        parts = [np.arange(self.prefix_length)]
        for group in self.groups:
            parts.append(self.prefix_length + np.arange(group.prompt_length))
            parts += [self.prefix_length + group.prompt_length + np.arange(n) for n in group.completion_lengths]
        arrays = [np.concatenate(parts)[None]]
        for group in self.groups:
            arrays += [array for _, lengths in group.runs for array in _padded_index(lengths)]
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
        # the common prefix
        prefix = slice(0, self.prefix_length)
        parts = []
        if self.prefix_length:
            parts.append(_causal(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], scale, window))
        for group, runs in zip(self.groups, self.padded_index, strict=True):
            # the group's prompt; after a prefix it attends as a single completion of that prefix
            prompt = group.prompt
            if self.prefix_length:
                order = torch.arange(group.prompt_length, device=self.device)
                padded = PaddedIndex(order[None], order[None] >= 0, order)
                parts.append(self._attend_after([prefix], prompt, padded, query, key, value, scale, window))
            else:
                parts.append(_causal(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], scale, window))
            # its completions, run by run
            for run, padded in runs:
                if run.start < run.stop:
                    earlier = [prefix, prompt] if self.prefix_length else [prompt]
                    parts.append(self._attend_after(earlier, run, padded, query, key, value, scale, window))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _attend_after(
        self,
        earlier: list[slice],
        run: slice,
        padded: PaddedIndex,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of the completions in `run`, which all continue the tokens in `earlier`: [1, H, n, d]."""
        earlier_keys, earlier_values = (
            torch.cat([tensor[0, :, part] for part in earlier], dim=1) for tensor in (key, value)
        )
        keys_values = (earlier_keys, earlier_values, key[0, :, run], value[0, :, run])
        # heads are independent, so that as many are computed at once as MAX_SCORES allows
        kv, repeats = key.shape[1], query.shape[1] // key.shape[1]
        num_tokens, longest = run.stop - run.start, padded.to_padded.shape[1]
        scores_per_head = repeats * (padded.to_padded.numel() * longest + num_tokens * earlier_keys.shape[1])
        step = max(1, MAX_SCORES // max(1, scores_per_head))
        outputs = [
            BranchAttention.apply(
                query[0, first * repeats : (first + step) * repeats, run],
                *(part[first : first + step] for part in keys_values),
                *padded,
                scale,
                window,
            )
            for first in range(0, kv, step)
        ]
        return torch.cat(outputs)[None]


def _padded_index(completion_lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a `PaddedIndex`."""
    lengths = np.array(completion_lengths, dtype=np.int64)
    steps = np.arange(lengths.max(initial=0))
    mask = steps[None] < lengths[:, None]
    index = np.where(mask, (np.cumsum(lengths) - lengths)[:, None] + steps[None], 0)
    return index, mask, np.flatnonzero(mask)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Ordinary causal attention, [1, H, L, d]."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (key, value))
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    place = torch.arange(length, device=query.device)
    visible = (place[:, None] >= place) & (place[:, None] - place < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


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
    ids = torch.arange(9, device=model.device) % int(model.config.get_text_config().vocab_size)
    prompt, completions = ids[:4], (ids[4:7], ids[5:9])
    expected = [
        body(input_ids=torch.cat([prompt, completion])[None], use_cache=False).last_hidden_state[0, 4:]
        for completion in completions
    ]
    shared_prompts = SharedPrompts([PromptGroup(0, 4, (3, 4))], model.device)
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
