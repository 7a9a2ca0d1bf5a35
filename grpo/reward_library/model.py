"""A reward model: a sequence classifier of transformers reads prompt and completion; its logit is the score.

It runs on the CPU of a reward worker, in one thread; a group's completions are sorted by length and read in batches. A
group's batches do not depend on the rank that sampled it, so the number of processes changes no score. The folder is
checked before it is opened: only safetensors weights, no code.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from grpo.reward_library.parameters import check_text, check_whole, declare
from grpo.rewards import completion_text


def model_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, folder: str = "", label: int = 0,
    max_length: int | None = None, batch_size: int = 8, **columns: Any,
) -> list[float]:  # fmt: skip
    """Logit `label` of the classifier in `folder`, for prompt and completion as one text.

    Texts longer than `max_length` tokens (null: the model's positions) lose their beginning. A conversation is the
    texts of its messages, a line each.
    """
    import torch

    model, tokenizer = load_classifier(folder)
    texts = [_prompt_text(p) + completion_text(c) for p, c in zip(prompts, completions, strict=True)]
    longest = max_length or _positions(model)
    ids = [tokenizer(text, truncation=longest is not None, max_length=longest)["input_ids"] for text in texts]
    scores = [0.0] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), ids[i]))  # ties in one order for any order given
    with torch.no_grad():
        for at in range(0, len(ids), batch_size):
            rows = by_length[at : at + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for row, score in zip(rows, logits[:, label].tolist(), strict=True):
                scores[row] = score
    return scores


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)


@cache
def load_classifier(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer, in fp32 with dropout off. Raises UserError or ValueError for a folder that will not do."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from grpo.models.checks import quiet
    from grpo.models.folder_checks import weights_problem
    from grpo.models.loading import load_tokenizer, prepare, resolve

    quiet()
    path = resolve(folder)  # looks at it first
    problem = weights_problem(Path(path))
    if problem is not None:
        raise ValueError(f"{folder!r} could not be loaded: {problem}. Give a folder with safetensors weights.")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        path,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        local_files_only=True,
    )
    model, found = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if found.get(kind):
            raise ValueError(f"{folder!r} holds no sequence classifier: {sorted(map(str, found[kind]))[0]} is missing.")
    tokenizer = load_tokenizer(path)
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"  # the answer stands at the end
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{folder!r}: its tokenizer has neither a padding nor an end token. Give it one.")
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return prepare(model), tokenizer


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _prepare(folder: Any, label: Any, max_length: Any, batch_size: Any) -> str:
    """Load it, so that no call waits for that, and its memory counts as the worker's own. Returns its fingerprint."""
    check_text("folder", folder)
    check_whole("batch_size", batch_size, 1)
    model, _ = load_classifier(folder)
    check_whole("label", label, 0, int(model.config.num_labels) - 1)
    if max_length is not None:
        check_whole("max_length", max_length, 1, _positions(model) or 2**31)
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


declare(model_reward, _prepare, sees_group=True)
