"""Which folders hold a causal language model: the others are refused with what they are and what to use instead."""

from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from grpo.errors import UserError
from grpo.strict_json import read_object

OTHER_INPUTS = {"vision_config": "images", "audio_config": "audio", "thinker_config": "images and audio"}


def check_class(name: str, folder: Path) -> None:
    """Refuse a folder whose model is of a class that is not trained here. Raises UserError."""
    settings = read_object(folder / "config.json", infinity=True)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(
            f"model: {name!r}: its config.json has no model_type, so its class is unknown. Give a folder written by "
            "save_pretrained."
        )
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model: {name!r} is of the type {model_type[:60]!r}, which transformers {transformers.__version__} does "
            "not have. Install a newer transformers, or use another model; code that comes with a model is never run."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        return
    named = settings.get("architectures")
    kind = str(named[0])[:80] if isinstance(named, list) and named else f"model of the type {model_type}"
    raise UserError(f"model: {name!r} is a {kind}: {_why(config)}")


def _why(config: PreTrainedConfig) -> str:
    """Why it is not trained here, and what to use."""
    if config.is_encoder_decoder:
        return "it reads the prompt with an encoder. Use a decoder-only model, such as a Llama or a Qwen."
    read = next((what for part, what in OTHER_INPUTS.items() if part in config.sub_configs), None)
    text = config.get_text_config(decoder=True)
    if read is None or not hasattr(text, "vocab_size"):
        return "it is no causal language model. Use one, such as a Llama or a Qwen."
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        part = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], "__name__", "causal language model")
        advice = f"Use the text-only model that it was made from, or save its language model and head as a {part}"
    else:
        advice = "Use a text-only model of its family"
    return f"it reads {read} beside text, and transformers has no causal language model of its type. {advice}."
