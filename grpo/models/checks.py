"""Loading a model by name, and checks of a model and its tokenizer: vocabulary, end tokens, lengths."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import UserError, first_line
from grpo.models.loading import load_plain, resolve
from grpo.models.lora_checks import is_adapter


def quiet() -> None:
    """Switch off progress bars and messages of transformers, datasets and DeepSpeed."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints on stdout which one it chose
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs errors that it also raises
    warnings.formatwarning = _as_one_line


def _as_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning without its place in the source."""
    kind = "warning" if category is UserWarning else category.__name__
    return f"{kind}: {first_line(Exception(message))}\n"


def load_model(name: str, device: torch.device) -> PreTrainedModel:
    """Load a causal language model in fp32 with dropout off. Raises UserError.

    An adapter's folder gives its model with the adapter added to the weights. See `load_plain` in loading.py.
    """
    if is_adapter(Path(resolve(name))):
        from grpo.models.lora import merged, open_adapter  # late: importing peft takes seconds

        return merged(open_adapter(resolve(name), device))
    return load_plain(name, device)


@dataclass(frozen=True)
class ModelSettings:
    """What `stop_token_ids` and `vocabulary_size` need of a model."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None


def without_weights(name: str) -> ModelSettings:
    """The settings of a model, for an adapter those of its base. Raises UserError."""
    folder = resolve(name, weights=False)
    if is_adapter(Path(folder)):
        from grpo.models.lora_files import base_of

        folder = resolve(base_of(Path(folder)), weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        own = (Path(folder) / "generation_config.json").exists()
        return ModelSettings(config, GenerationConfig.from_pretrained(folder) if own else None)
    except (OSError, ValueError) as error:
        raise UserError(f"model: the settings of {name!r} could not be loaded: {first_line(error)[:200]}") from None


def stop_token_ids(
    model: PreTrainedModel | ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    end_of_turn: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> frozenset[int]:
    """All ids that end a completion: the generation config's, the model config's and the tokenizer's.

    end_of_turn: a token that the chat template ends an assistant turn with (Recipe.end_of_turn). A base model may name
    only <|endoftext|>, and would go on after it; where it is none of the ids above, `say` gets a line, and the model's
    generation config gets all ids, so that its checkpoints and exports stop there in other programs too.

    Raises UserError for an id that is no token of the model.
    """
    limit = vocabulary_size(model)
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        for token in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < limit:
                raise UserError(
                    f"model: eos_token_id must be tokens of the model, 0 to {limit - 1}, got {str(token)[:60]!r}. "
                    "Mend generation_config.json, config.json or the tokenizer."
                )
            ids.add(token)
    token = None if end_of_turn is None else tokenizer.get_vocab().get(end_of_turn)
    if token is not None and token < limit and token not in ids:
        own = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ids)))) or "none"
        say(f"completions also end at {end_of_turn}, which ends a turn in the chat template; the model's own: {own}")
        ids.add(token)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = sorted(ids)
    return frozenset(ids)


def vocabulary_size(model: PreTrainedModel | ModelSettings) -> int:
    """Number of tokens that the model has embeddings for, also when its weights are sharded."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rules: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Refuse a tokenizer with tokens that the model has no embedding for. Returns how many ids may be sampled.

    Embeddings are often padded, and ids behind the tokenizer's last one stand for no text. They are neither sampled
    nor part of the softmax; under the rules of older runs (Recipe.rules 1) they are. Raises UserError.
    """
    limit = vocabulary_size(model)
    vocabulary = tokenizer.get_vocab()
    beyond = {token: i for token, i in vocabulary.items() if not 0 <= i < limit}
    if beyond:
        token = min(beyond, key=lambda token: beyond[token])
        raise UserError(
            f"model: its tokenizer has {len(beyond)} tokens beyond the model's {limit}, such as {token[:40]!r} with id "
            f"{beyond[token]}. Use the model's own tokenizer, or resize the model's embeddings."
        )
    count = max(vocabulary.values(), default=limit - 1) + 1 if rules > 1 else limit
    if count < limit:
        say(f"model: {limit} embeddings, {count} tokens: ids from {count} on are neither sampled nor trained")
    return count


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model has positions for; None if its config has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_lengths(model: PreTrainedModel, max_prompt_length: int, max_generate_length: int) -> None:
    """Refuse lengths that the model has no positions for. Raises UserError."""
    limit = max_positions(model)
    if limit is not None and max_prompt_length + max_generate_length > limit:
        raise UserError(
            f"max_prompt_length + max_generate_length: must be at most the model's {limit} positions, "
            f"got {max_prompt_length} + {max_generate_length}. Lower one."
        )


def is_lora(model: nn.Module) -> bool:
    """Whether the model is frozen and an adapter inside it is trained (lora.py)."""
    return hasattr(model, "lora_config")
