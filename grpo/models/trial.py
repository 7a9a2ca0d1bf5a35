"""What training relies on, tried on a few tokens when a model is loaded.

    its checkpoints can be opened again
    the model reads token ids alone and gives logits [B, L, V]
    a later token leaves the logits of earlier ones alone       it is causal
    what stands behind or beside a row leaves its logits alone  micro-batches pad rows on the right
    its backward works

Whether prompts can be shared, the head applied in blocks and which cache fits is tried where it is used:
forward/shared_attention.py, forward/logprobs.py, rollout/caches.py. There a slower way is left, with a notice; a model
that fails here cannot be trained and is refused. NaN weights pass: the guards of the update report them.
"""

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from grpo.errors import UserError, first_line
from grpo.forward.arguments import accepted, trial_ids
from grpo.forward.modes import set_mode
from grpo.runtime.out_of_memory import ran_out

LENGTH = 9  # tokens of the row that is tried
PADDING = 3  # tokens behind it
MAX_DIFFERENCE = 1e-4  # relative, in fp32
MAX_DIFFERENCE_4BIT = 5e-2  # the same where products are not fp32


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str, exact: bool = True) -> None:
    """Raises UserError for a model that cannot be trained, with the reason. exact: all products are fp32."""
    problem = _problem(model, MAX_DIFFERENCE if exact else MAX_DIFFERENCE_4BIT)
    if problem is not None:
        raise UserError(
            f"model: {name!r} ({type(model).__name__}) is not a causal language model of text that can be trained: "
            f"{problem}. Use a decoder that reads and writes text; docs/models.md lists the types."
        )


def _problem(model: PreTrainedModel, limit: float) -> str | None:
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"transformers opens no checkpoint of it: its config has the type {model.config.model_type!r}"
    vocabulary = int(model.config.get_text_config().vocab_size)
    row = trial_ids(LENGTH, vocabulary, model.device)
    model.eval()
    try:
        alone = _logits(model, row[None])[0]
    except Exception as error:  # whatever an architecture raises for input it does not expect
        if ran_out(error):
            raise
        return f"given token ids alone it raises {type(error).__name__}: {first_line(error)[:150]}"
    if alone.ndim != 2 or alone.shape[0] != LENGTH or alone.shape[1] < vocabulary:
        return f"its logits of {LENGTH} tokens have the shape {list(alone.shape)}, not [{LENGTH}, {vocabulary}]"
    if not bool(torch.isfinite(alone).all()):
        return None
    size = max(float(alone.abs().amax()), 1.0)

    def differs(found: Tensor, expected: Tensor) -> str | None:
        gap = float((found - expected).abs().amax()) / size
        return None if gap <= limit else f"(logits differ by {gap:.1e})"

    # one batch: the row with padding behind it; the row with another last token
    changed = torch.cat([row[:-1], (row[-1:] + 1) % vocabulary, row.new_zeros(PADDING)])
    padded = torch.cat([row, row.new_zeros(PADDING)])
    try:
        together = _logits(model, torch.stack([padded, changed]))
        gap = differs(together[0, :LENGTH], alone) or differs(together[1, : LENGTH - 1], alone[: LENGTH - 1])
        if gap and differs(_logits(model, changed[None, :LENGTH])[0, : LENGTH - 1], alone[: LENGTH - 1]):
            return f"a later token changes the logits of earlier ones {gap}"
        if gap:
            return f"a row's logits depend on what stands behind or beside it {gap}"
        _backward(model, row[None])
    except Exception as error:
        if ran_out(error):
            raise
        return f"padding or its backward raises {type(error).__name__}: {first_line(error)[:150]}"
    return None


def _backward(model: PreTrainedModel, ids: Tensor) -> None:
    """A backward to the embeddings of the tokens: no gradient of a weight takes memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zero = torch.zeros((), device=model.device, requires_grad=True)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + zero)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            _logits(model, ids).sum().backward()
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_()


@torch.no_grad()
def enable_checkpointing(model: PreTrainedModel) -> None:
    """Compute activations again in the backward. Checkpointed layers are in training mode: it must change nothing.

    Raises UserError for a model that cannot, or whose layers draw noise in training mode.
    """
    try:
        # The second name is that of transformers before 5.23. Both default to checkpointing without reentrance.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {first_line(error)[:150]} Set it to false.") from None
    model.enable_input_require_grads()
    if not all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return  # a frozen base in fewer bits; its own run in fp32 would be tried
    ids = trial_ids(LENGTH, int(model.config.get_text_config().vocab_size), model.device)[None]
    logits = []
    for training in (False, True):
        set_mode(model, training, dropout=False)
        logits.append(_logits(model, ids))
    set_mode(model, False)
    if float((logits[1] - logits[0]).abs().amax()) > MAX_DIFFERENCE * max(float(logits[0].abs().amax()), 1.0):
        raise UserError(
            f"gradient_checkpointing: layers of {type(model).__name__} compute other logits in training mode, which it "
            "needs. Set it to false."
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, **accepted(model, {"use_cache": False})).logits.float()
