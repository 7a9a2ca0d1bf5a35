"""bitsandbytes on this machine's CPU: 4-bit layers and 8-bit moments work, train, come back; what cannot is refused."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

from grpo.checkpoints import background as saving
from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints import resume
from grpo.config.settings import Config
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from grpo.forward.logprobs import Scorer
from grpo.models import lora as adapters
from grpo.models import quantization
from grpo.models.checks import load_model
from grpo.runtime.distributed import World
from grpo.training.backends.ddp import Ddp
from grpo.training.load_policy import load_policy
from grpo.training.policy import Policy
from tests.models.test_lora import shaken
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
IDS = torch.arange(4, 28)[None]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def library():
    return pytest.importorskip("bitsandbytes")


def settings(**how):
    return Config(**{"model": "m", "data": "d", "rewards": {"r": 1.0}, "lr": 1e-2, **how})


def train(policy, steps):
    losses = []
    for _ in range(steps):
        loss = policy.model(IDS, labels=IDS).loss
        policy.backend.backward(loss, last=True)
        policy.backend.step(1e-2, 1.0)
        policy.counters.updates += 1
        losses.append(float(loss.detach()))
    return losses


def save(folder, policy, cfg):
    snapshot = checkpoint.take_snapshot(2, policy, saving.serialized_tokenizer(tiny_tokenizer()), Recipe(), cfg, {})
    return checkpoint.write_snapshot(snapshot, folder, ALONE, None, lambda phase: None)


# --- 8-bit moments


def large_model(seed=0):
    """Matrices above bitsandbytes' 4,096 elements (embeddings, MLP), and smaller ones below."""
    return tiny_model("qwen3", 300, seed=seed)


def test_8_bit_moments_train_as_32_bit_ones_do_in_a_quarter_of_the_memory(library):
    ends, held = {}, {}
    for kind in ("adamw", "adamw_8bit"):
        policy = Policy(settings(optimizer=kind), ALONE, large_model())
        losses = train(policy, 20)
        assert losses[-1] < 0.7 * losses[0]
        ends[kind] = losses[-1]
        states = {name: values for name, values in policy.backend.local_tensors() if " of model.embed_tokens" in name}
        held[kind] = sum(values.nbytes for values in states.values())
    assert ends["adamw_8bit"] == pytest.approx(ends["adamw"], rel=0.1) and ends["adamw_8bit"] != ends["adamw"]
    assert held["adamw_8bit"] < 0.27 * held["adamw"]


def test_8_bit_moments_come_back_to_the_bit(library, tmp_path):
    """Straight on, and from a checkpoint: the same weights. The control: moments that were lost give others."""
    cfg = settings(optimizer="adamw_8bit", model=str(save_tiny(tmp_path / "base")))
    straight = load_policy(cfg, ALONE)
    train(straight, 3)
    assert save(tmp_path, straight, cfg) is None
    resumed, lost = (load_policy(cfg, ALONE, tmp_path / "checkpoint_2") for _ in range(2))
    assert resume.restore(resumed, tmp_path / "checkpoint_2") == 0 and resumed.counters.updates == 3
    kinds = {piece.moment for piece in straight.backend.moments()}
    assert kinds == {"codes1", "codes2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq"}, "both kinds of moments"
    for (name, a), (again, b) in zip(straight.backend.local_tensors(), resumed.backend.local_tensors(), strict=True):
        assert name == again and torch.equal(a, b)
    for policy in (straight, resumed, lost):
        train(policy, 3)
    ends = [dict(policy.weights()) for policy in (straight, resumed, lost)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_paged_moments_are_refused_on_the_cpu(library):
    with pytest.raises(UserError, match=r"^optimizer: paged_adamw_8bit needs CUDA"):
        Policy(settings(optimizer="paged_adamw_8bit"), ALONE, large_model())


# --- 4 bits


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_4_bit_model_is_near_the_whole_one_and_gives_it_gradient(library, tmp_path, architecture):
    base = str(save_tiny(tmp_path / "base", architecture, spread=1.0))
    cfg = settings(model=base, lora_r=4, load_in_4bit=True)
    model = shaken(adapters.load_lora(cfg, CPU))
    whole = shaken(adapters.load_lora(dataclasses.replace(cfg, load_in_4bit=False), CPU))
    four = [m for m in model.modules() if quantization.is_4bit(m) and hasattr(m, "quant_state")]
    assert len(four) == 14 and all(m.weight.dtype == torch.uint8 for m in four)
    assert sum(m.weight.nbytes for m in four) * 8 == sum(m.in_features * m.out_features * 4 for m in four)
    assert Scorer(model, cfg).head.usable
    gradients, logits = [], []
    for each in (model, whole):
        logits.append(each(IDS).logits)
        logits[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.ravel() for p in adapters.adapter_tensors(each).values()]))
    gap = float((logits[0] - logits[1]).norm() / logits[1].norm())
    assert 1e-4 < gap < 0.3, "4 bits must show, and must not be another model"
    assert torch.cosine_similarity(*gradients, dim=0) > 0.8


def test_a_4_bit_run_learns_is_saved_and_merges_to_the_same_numbers(library, tmp_path):
    base = str(save_tiny(tmp_path / "base", "qwen2", spread=1.0))
    cfg = settings(model=base, lora_r=4, load_in_4bit=True)
    policy = load_policy(cfg, ALONE)
    frozen = {name: p.data.clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    losses = train(policy, 20)
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in policy.model.named_parameters():
        assert name not in frozen or torch.equal(frozen[name], parameter.data), "sampling or training changed the base"
    assert save(tmp_path, policy, cfg) is None
    opened = adapters.open_adapter(tmp_path / "checkpoint_2", CPU)
    assert any(quantization.is_4bit(m) for m in opened.modules())
    with torch.no_grad():
        trained = policy.model.eval()(IDS).logits
        assert torch.equal(opened(IDS).logits, trained)
        merged = load_model(str(tmp_path / "checkpoint_2"), CPU)
        assert not any(quantization.is_4bit(m) for m in merged.modules())
        assert (merged(IDS).logits - trained).abs().max() < 1e-4
        assert (load_model(base, CPU)(IDS).logits - trained).abs().max() > 1e-2


def test_sampling_and_training_share_one_arithmetic(library, tmp_path):
    """bitsandbytes would repack weights for a kernel of its own in eval mode, where the CPU has AVX512-BF16."""
    cfg = settings(model=str(save_tiny(tmp_path / "base", "qwen2")), lora_r=4, load_in_4bit=True)
    model = adapters.load_lora(cfg, CPU)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, model.train()(IDS).logits)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu"))


def test_gpt2_has_no_linear_layers_to_hold(library, tmp_path):
    cfg = settings(model=str(save_tiny(tmp_path / "base", "gpt2")), lora_r=4, load_in_4bit=True)
    with pytest.raises(UserError, match=r"^load_in_4bit: GPT2LMHeadModel has no linear layers"):
        load_policy(cfg, ALONE)


# --- without the library, and without a network


@pytest.mark.parametrize(
    "setting, how", [("load_in_4bit", {"lora_r": 4, "load_in_4bit": True}), ("optimizer", {"optimizer": "adamw_8bit"})]
)
def test_without_bitsandbytes_one_line_says_what_is_missing(tmp_path, monkeypatch, setting, how):
    cfg = settings(model=str(save_tiny(tmp_path / "base", "qwen2")), **how)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=rf"^{setting}: needs bitsandbytes.*quant") as caught:
        load_policy(cfg, ALONE)
    assert "\n" not in str(caught.value)


def test_nothing_is_fetched_while_it_is_imported():
    before = sys.modules.get("kernels")
    with quantization.no_kernel_download(), pytest.raises(ImportError):
        import kernels  # noqa: F401
    assert sys.modules.get("kernels") is before


# --- on a GPU


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_on_a_gpu(library, kind):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = tiny_model("qwen3", 300).to(device)
    backend = Ddp(Scorer(model, settings(optimizer=kind)), settings(optimizer=kind), World(0, 1, 0, 1, device))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        backend.backward(model(IDS.to(device), labels=IDS.to(device)).loss, last=True)
        backend.step(1e-2, 1.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert any(piece.moment == "codes1" for piece in backend.moments())


@gpu
@pytest.mark.gpu
def test_a_4_bit_model_on_a_gpu(library, tmp_path):
    device = torch.device("cuda")
    cfg = settings(model=str(save_tiny(tmp_path / "base", "qwen2", spread=1.0)), lora_r=4, load_in_4bit=True)
    policy = load_policy(cfg, World(0, 1, 0, 1, device))
    loss = policy.model(IDS.to(device), labels=IDS.to(device)).loss
    policy.backend.backward(loss, last=True)
    assert policy.backend.step(1e-2, 1.0) > 0
    assert all(isinstance(p, nn.Parameter) and p.device.type == "cuda" for p in policy.model.parameters())
