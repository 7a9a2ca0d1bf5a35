"""Files of processors (images, video, audio) that a model folder has: what is saved from it must have them, too.

Only settings in JSON that transformers reads are copied, and checked before; never code, never a pickle.
"""

from pathlib import Path

from grpo.errors import UserError
from grpo.models.folder_checks import check_entry
from grpo.models.lora_checks import is_adapter

NAMES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
TEMPLATE = "chat_template.json"  # of old processors; the tokenizer's own template is saved as chat_template.jinja


def processor_files(folder: str, has_template: bool) -> dict[str, bytes]:
    """Name -> content of the files in a model's folder; those of an adapter without any are its base model's.

    has_template: whether a chat template is saved beside them, so that an older one must not be. Raises UserError.
    """
    path = Path(folder)
    names = NAMES if has_template else (*NAMES, TEMPLATE)
    found = [path / name for name in names if (path / name).exists()]
    if folder and not found and is_adapter(path):
        from grpo.models.loading import resolve
        from grpo.models.lora_files import base_of

        path = Path(resolve(base_of(path), weights=False))
        found = [path / name for name in names if (path / name).exists()]
    try:
        for file in found:
            check_entry(file)
        return {file.name: file.read_bytes() for file in found}
    except (OSError, ValueError) as error:
        raise UserError(f"model: a file of {folder!r} cannot be copied: {error}. Mend it, or remove it.") from None
