"""What is tried when a model is loaded: each check finds its model, and without the check that model goes wrong."""

import pytest
import torch

from grpo.errors import UserError
from grpo.forward import head_check, logprobs
from grpo.forward.modes import set_mode
from grpo.models import loading
from grpo.models.loading import prepare
from grpo.models.trial import check_model, enable_checkpointing
from grpo.rollout import cache_choice, engine
from grpo.training import policy
from tests.support.tiny import ARCHITECTURES, tiny_model
from tests.support.zoo import zoo_model
from tests.support.zoo_run import run_type

IDS = torch.arange(3, 40)[None]
REFUSED = {
    "bert": "a later token changes the logits of earlier ones",
    "prophetnet": "a row's logits depend on what stands behind or beside it",
    "reformer": "padding or its backward raises AssertionError",
    "mllama": "transformers opens no checkpoint of it: its config has the type 'mllama_text_model'",
    "xmod": "given token ids alone it raises ValueError",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(model_type):
    with pytest.raises(UserError) as refused:
        check_model(prepare(zoo_model(model_type)), "folder")
    assert REFUSED[model_type] in str(refused.value) and "\n" not in str(refused.value)


def test_logits_of_another_shape_are_refused():
    model = tiny_model("llama")
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits[:, None]))
    with pytest.raises(UserError, match=r"its logits of 9 tokens have the shape \[1, 9, 300\], not \[9, 300\]"):
        check_model(model, "folder")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_six_pass_and_keep_their_state(architecture):
    model = tiny_model(architecture)
    check_model(model, "folder")
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_weights_with_nan_pass():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan
    check_model(model, "folder")


@pytest.mark.parametrize("model_type", ["opt", "xglm", "biogpt"])
def test_probabilities_that_forwards_read_themselves_are_off(model_type):
    """Their layers call functional dropout; as they were made, training mode computes other logits."""
    with pytest.raises(UserError, match="compute other logits in training mode"):
        enable_checkpointing(zoo_model(model_type))
    enable_checkpointing(prepare(zoo_model(model_type)))


def test_routers_stay_in_inference_mode():
    """Phi-MoE's router samples experts in training mode; only checkpointed layers are put into it."""
    model = prepare(zoo_model("phimoe"))
    before = model(input_ids=IDS).logits
    assert not torch.allclose(model.train()(input_ids=IDS).logits, before, atol=1e-3), "the control"
    enable_checkpointing(model)
    set_mode(model, True)
    assert any(module.training for module in model.modules())
    torch.testing.assert_close(model(input_ids=IDS).logits, before)


def test_a_model_without_checkpointing_is_refused():
    model = tiny_model("llama")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match="Set it to false"):
            enable_checkpointing(model)
    finally:
        type(model).supports_gradient_checkpointing = before


# --- controls: one check switched off, and the model that then goes wrong


@pytest.mark.full
def test_without_the_check_of_causality(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "check_model", lambda *args, **named: None)
    trial = run_type(tmp_path, "bert")
    assert not trial.refused and trial.gap > 1e-3, trial


@pytest.mark.full
def test_without_the_choice_of_a_cache(monkeypatch, tmp_path):
    """Left padding reaches the states of Mamba and the positions of BART."""
    monkeypatch.setattr(engine, "choose_cache", lambda head, shares: "padded")
    for model_type in ("mamba", "bart"):
        folder = tmp_path / model_type
        folder.mkdir()
        trial = run_type(folder, model_type)
        assert trial.gap > 1e-2 and trial.greedy > 0, trial


@pytest.mark.full
def test_without_the_check_of_shared_prompts(monkeypatch, tmp_path):
    """The convolutions of LFM2 see the completion that stands before in the flat row."""
    monkeypatch.setattr(logprobs, "can_share", lambda model, body: True)
    assert run_type(tmp_path, "lfm2").gap > 1e-3


@pytest.mark.full
def test_without_the_check_of_the_head(monkeypatch, tmp_path):
    """RecurrentGemma caps its logits; a head that does not know the cap scores another distribution."""
    monkeypatch.setattr(logprobs, "SOFT_CAPS", ())
    monkeypatch.setattr(head_check, "MAX_DIFFERENCE", {True: 1e9})
    assert run_type(tmp_path, "recurrent_gemma").gap > 1e-3


@pytest.mark.full
def test_without_randomness_off(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "prepare", lambda model: loading.use_shared_attention(model) or model.eval())
    monkeypatch.setattr(policy, "enable_checkpointing", lambda model: model.activation_checkpointing_enable())
    trial = run_type(tmp_path, "opt", gradient_checkpointing="true")
    assert trial.gap > 1e-2, trial


def test_the_head_of_a_base_in_bf16_is_usable():
    """As LoRA holds a frozen base under dtype bf16: its weights and fp32 inputs do not multiply without autocast."""
    assert logprobs.Head(tiny_model("qwen3").bfloat16(), "bf16").usable


def test_a_cache_that_does_not_fit_in_memory_is_not_passed_over(monkeypatch):
    def out_of_memory(kind, head):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cache_choice, "_difference", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cache_choice.choose_cache(logprobs.Head(tiny_model("llama")), True)
