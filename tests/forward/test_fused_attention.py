"""Fused attention in parts equals softmax attention in float64, in result and gradients, without scores in memory.

Controls: the log-sum-exp of one part in place of the merged one, and scores in memory.
"""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.forward import attention_kernels, attention_parts, fused_attention, shared_attention
from grpo.forward.attention_kernels import CpuFlash
from grpo.forward.attention_parts import parts_of, windowed_parts
from grpo.forward.fused_attention import FusedAttention, difference, fused_kernel
from grpo.forward.shared_attention import PromptGroup, SharedPrompts

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def drawn(tokens, heads=4, key_heads=2, width=8, value_width=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    widths = (width, width, value_width or width)
    shapes = [(1, count, tokens, w) for count, w in zip((heads, key_heads, key_heads), widths, strict=True)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(query, key, value, visible):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.mT * 0.3).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def visible_in(prefix, prompts, completions, window=10**9):
    """Which tokens each token of the row sees, from the definition: a text is prefix, prompt, completion."""
    place = [*range(prefix), *(prefix + i for length in prompts for i in range(length))]
    place += [
        prefix + prompt + i
        for prompt, own in zip(prompts, completions, strict=True)
        for length in own
        for i in range(length)
    ]
    names = [("prefix",)] * prefix
    names += [("prompt", p) for p, length in enumerate(prompts) for _ in range(length)]
    names += [("own", p, i) for p, own in enumerate(completions) for i, length in enumerate(own) for _ in range(length)]
    seen = torch.zeros(len(names), len(names), dtype=torch.bool)
    for row, name in enumerate(names):
        earlier = {"prefix": set(), "prompt": {("prefix",)}, "own": {("prefix",), ("prompt", *name[1:2])}}[name[0]]
        for column, other in enumerate(names):
            seen[row, column] = other in earlier or (other == name and column <= row)
            seen[row, column] &= place[row] - place[column] < window
    return seen


def values(out, inputs):
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad((out * pull).sum(), inputs)]


layouts = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=4)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(prefix=st.integers(0, 5), groups=layouts, alone=st.sampled_from([3, 256]), spared=st.sampled_from([0, 2**16]))
def test_any_layout_equals_plain_attention(prefix, groups, alone, spared):
    prompts, completions = [length for length, _ in groups], [own for _, own in groups]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_parts, "ALONE", alone)
        patch.setattr(attention_parts, "SPARED_SCORES", spared)
        parts = parts_of(prefix, prompts, completions)
        inputs = drawn(parts[0].queries.stop)
        found = values(FusedAttention.apply(*inputs, parts, CpuFlash(), 0.3), inputs)
    for ours, exact in zip(
        found, values(plain(*inputs, visible_in(prefix, prompts, completions)), inputs), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(prefix=st.integers(0, 5), groups=layouts, window=st.integers(1, 30), block=st.integers(1, 6))
def test_any_layout_with_a_window_equals_plain_attention(prefix, groups, window, block):
    prompts, completions = [length for length, _ in groups], [own for _, own in groups]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_parts, "BLOCK", block)
        patch.setattr(attention_parts, "ALONE", 3)
        parts = windowed_parts(prefix, prompts, completions, window)
        inputs = drawn(parts[0].queries.stop)
        found = values(FusedAttention.apply(*inputs, parts, CpuFlash(), 0.3), inputs)
    exact = values(plain(*inputs, visible_in(prefix, prompts, completions, window)), inputs)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_gradient_by_finite_differences():
    inputs = drawn(10, heads=2, key_heads=1, width=3)
    parts = parts_of(2, [2, 1], [(2, 3), ()])
    assert torch.autograd.gradcheck(lambda *tensors: FusedAttention.apply(*tensors, parts, CpuFlash(), 0.3), inputs)


@pytest.mark.parametrize("widths", [(12, 8), (8, 12)])
def test_values_of_another_width_than_keys(widths):
    width, value_width = widths
    shared = SharedPrompts([PromptGroup(3, (4, 2)), PromptGroup(2, (1,))], CPU, prefix_length=2)
    inputs = drawn(14, width=width, value_width=value_width)
    found = values(shared.attend(0, *inputs, 0.3, None).transpose(1, 2), inputs)
    for ours, exact in zip(found, values(plain(*inputs, visible_in(2, [3, 2], [(4, 2), (1,)])), inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


class UnmergedBackward(CpuFlash):
    """A kernel whose backward ignores what it is told of the other parts."""

    def backward(self, gradient, saved, part, scale):
        out, lse, _ = self.forward(saved.query, saved.key, saved.value, part, scale)
        return super().backward(gradient, saved._replace(out=out, lse=lse), part, scale)


class WrongValues(CpuFlash):
    def forward(self, query, key, value, part, scale):
        out, lse, others = super().forward(query, key, value, part, scale)
        return out * 1.01, lse, others


class Refuses(CpuFlash):
    def forward(self, query, key, value, part, scale):
        raise RuntimeError("head_dim should be a multiple of 8\nand more")


@pytest.fixture
def fresh():
    fused_kernel.cache_clear()
    yield
    fused_kernel.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(UnmergedBackward, "differs from plain"), (WrongValues, "differs from plain"), (Refuses, "multiple of 8")],
)
def test_a_kernel_that_is_wrong_is_not_used(kernel, reason, fresh, monkeypatch):
    monkeypatch.setattr(attention_kernels, "choose", lambda device, dtype: kernel())
    inputs = drawn(9, dtype=torch.float32)
    shared = SharedPrompts([PromptGroup(3, (4, 2))], CPU)
    with pytest.warns(UserWarning, match=f"4 heads of width 8 in float32 on cpu holds its scores in memory.*{reason}"):
        out = shared.attend(0, *inputs, 0.3, None).transpose(1, 2)
    torch.testing.assert_close(out, plain(*inputs, visible_in(0, [3], [(4, 2)])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_kernel(CPU, torch.float32, 4, 2, 8, False) is None, "said once"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_check_passes_torchs_kernels_by_a_margin(dtype):
    limit = fused_attention.LIMITS.get(dtype, fused_attention.OTHER_LIMIT)
    for window in (None, fused_attention.WINDOW):
        gap = difference(CpuFlash(), CPU, dtype, 9, 3, 64, window)
        assert gap < limit / 3 and difference(UnmergedBackward(), CPU, dtype, 9, 3, 64, window) > 3 * limit


def test_a_kernel_that_ignores_the_window_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(attention_parts.Block, "mask", lambda block, dtype: None)
    with pytest.warns(UserWarning, match="differs from plain attention"):
        assert fused_kernel(CPU, torch.float32, 4, 2, 8, True) is None


class Largest(TorchDispatchMode):
    """The most elements that any operation returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("window", [None, 400])
def test_no_tensor_grows_with_the_square_of_the_length(window, monkeypatch):
    shared = SharedPrompts([PromptGroup(700, (600, 300))], CPU)
    inputs = drawn(1600, heads=2, key_heads=1, width=16, dtype=torch.float32)
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(shared_attention, "fused_kernel", lambda *shape: None)
        with Largest() as mode:
            values(shared.attend(0, *inputs, 0.3, window), inputs)
        assert (mode.elements <= 2 * 1600 * 48) == fused  # with a window: its masks, 200 x 600


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 8, 64), (16, 8, 128), (14, 2, 64), (4, 1, 256), (4, 4, 80)])
def test_kernels_of_a_gpu(shape, dtype, fresh):
    """As `difference`, and at lengths that fill several blocks of a kernel."""
    kernel = fused_kernel(CUDA, dtype, *shape)
    assert kernel is not None
    lengths = (300, [700, 20, 129], [(1000, 513, 64, 1), (), (2, 33)])
    shared = SharedPrompts(
        [PromptGroup(n, own) for n, own in zip(lengths[1], lengths[2], strict=True)], CUDA, prefix_length=lengths[0]
    )
    heads, key_heads, width = shape
    inputs = [x.detach().to(CUDA, dtype).requires_grad_() for x in drawn(2762, heads, key_heads, width)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    found = values(shared.attend(0, *inputs, 0.3, None).transpose(1, 2), inputs)
    exact = values(plain(*exact_inputs, visible_in(*lengths).to(CUDA)), exact_inputs)
    for ours, theirs in zip(found, exact, strict=True):
        gap = float((ours.double() - theirs).norm() / theirs.norm())
        assert gap < (1e-4 if dtype == torch.float32 else 2e-2)


def test_parts_say_what_they_are():
    whole, prompt, prefix = parts_of(2, [3, 1], [(4, 2), ()])
    assert (whole.causal, whole.query_lengths) == (True, (2, 3, 1, 4, 2))
    assert (prompt.queries, prompt.keys, prompt.query_lengths, prompt.key_lengths) == (
        slice(6, 12),
        slice(2, 6),
        (6, 0),
        (3, 1),
    )
    assert (prefix.queries, prefix.keys, prefix.pairs) == (slice(2, 12), slice(0, 2), [(slice(0, 10), slice(0, 2))])
    assert fused_attention.offsets_of(prompt).tolist() == [[0, 6, 6], [0, 3, 4]]
    assert [call[:2] for call in dataclasses.replace(whole, causal=False).calls] == whole.pairs
