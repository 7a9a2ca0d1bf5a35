"""Counter-based sampling: the right distribution and support, and draws that depend on the row's own key only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.settings import Config
from grpo.randomness import hash_keys, permutation, uniforms
from grpo.rollout.chunks import cut_chunks
from grpo.rollout.sampling import Sampling, draw, kept_support


def test_inverse_cdf_in_vocabulary_order():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(5, 1)
    picks = draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71], dtype=torch.float64), Sampling()).token_ids
    assert picks.tolist() == [0, 0, 1, 1, 2]


def test_impossible_tokens_are_never_drawn():
    """A uniform at the very end of the sum picks the last token that has any probability."""
    logits = torch.tensor([[0.0, 0.0, -300.0]])
    drawn = draw(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64), Sampling(logit_clamp=1e4))
    assert drawn.token_ids.item() == 1


def test_frequencies_match_the_distribution():
    """20,000 draws of 5 tokens; a deviation of 5 standard errors by chance has p < 1e-5. Control: a shifted target."""
    probs = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.4])
    count = 20_000
    randoms = torch.from_numpy(uniforms(11, np.arange(count), np.zeros(count, int), 1)[:, 0])
    picks = draw(probs.log().repeat(count, 1), randoms, Sampling()).token_ids
    shares = torch.bincount(picks, minlength=5) / count
    error = (probs * (1 - probs) / count).sqrt()
    assert bool(((shares - probs).abs() < 5 * error).all())
    assert not bool(((shares - probs.roll(1)).abs() < 5 * error).all())


def test_top_p_renormalises_over_the_kept_support():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = draw(logits, torch.tensor([0.7], dtype=torch.float64), Sampling(top_p=0.7, max_support=4))
    assert drawn.support.tolist() == [[0, 1, -1, -1]]
    assert drawn.token_ids.item() == 1 and drawn.logprobs.exp().item() == pytest.approx(0.375)


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(top_k=2), {1, 3}),
        (Sampling(min_p=0.6), {1, 3}),
        (Sampling(top_p=0.45), {1, 3}),
        (Sampling(top_p=0.99, max_support=3), {1, 2, 3}),
        (Sampling(top_p=1e-9), {3}),
    ],
    ids=["top_k", "min_p", "top_p crosses", "max_support", "at least one"],
)
def test_kept_support(sampling, kept):
    support = kept_support(torch.tensor([[0.1, 0.3, 0.2, 0.4]]), sampling)
    assert {i for i in support[0].tolist() if i >= 0} == kept and support.shape[1] == sampling.support_width


def test_greedy_takes_the_likeliest():
    assert draw(torch.tensor([[0.0, 2.0, 1.0]]), torch.zeros(1), Sampling(temperature=0)).token_ids.item() == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_flagged_and_leave_the_others_alone(poison):
    logits = torch.tensor([[0.0, 1.0], [poison, 1.0]])
    drawn = draw(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), Sampling())
    clean = draw(logits[:1], torch.tensor([0.9], dtype=torch.float64), Sampling())
    assert drawn.finite.tolist() == [True, False]
    assert drawn.token_ids[0] == clean.token_ids[0] and drawn.logprobs[0] == clean.logprobs[0]


def test_uniforms_are_uniform_and_independent_of_the_batch():
    numbers = uniforms(5, np.arange(400), np.arange(400) % 7, 50)
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / numbers.size) ** 0.5
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 5 / numbers.size**0.5
    np.testing.assert_array_equal(uniforms(5, np.array([9]), np.array([2]), 10)[0], numbers[9, :10])
    assert len(np.unique(numbers)) == numbers.size


def test_uniforms_are_fixed_for_ever():
    """Other numbers would break the exact resume of existing runs."""
    np.testing.assert_array_equal(
        uniforms(42, np.array([3]), np.array([1]), 3)[0],
        [0.8528937062586588, 0.7053057684018121, 0.0518139735476687],
    )


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 60))
@settings(max_examples=30)
def test_permutation_is_one_and_differs_between_epochs(seed, epoch, size):
    order = permutation(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    if size > 20:
        assert order.tolist() != permutation(seed, epoch + 1, size).tolist()


def test_hash_separates_its_keys():
    assert len({int(hash_keys(a, b)) for a in range(30) for b in range(30)}) == 900


@given(st.integers(1, 9), st.integers(2, 9), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_chunks_cover_every_row_once(num_prompts, group, chunk_rows, ranks, whole_groups):
    whole_groups &= chunk_rows >= group
    chunks = cut_chunks(num_prompts, group, chunk_rows, ranks, whole_groups)
    assert [n for chunk in chunks for n in chunk] == list(range(num_prompts * group))
    assert min(map(len, chunks)) >= 1 and max(map(len, chunks)) <= chunk_rows
    whole = all(len(chunk) % group == 0 and chunk[0] % group == 0 for chunk in chunks)
    assert whole or not whole_groups
    units = num_prompts if whole_groups else num_prompts * group
    assert len(chunks) >= min(ranks, units)
    assert len(chunks) % ranks == 0 or len(chunks) == units


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("num_prompts", [1, 2, 8])
def test_no_rank_waits_where_completions_are_equally_long(num_prompts, ranks):
    """Defaults, 8, 16 and 64 rows: every rank decodes once, as many rows. Control: the cut for one rank."""
    sizes = [len(chunk) for chunk in cut_chunks(num_prompts, 8, Config.rollout_chunk_rows, ranks)]
    assert sizes == [num_prompts * 8 // ranks] * ranks
    assert len(cut_chunks(num_prompts, 8, Config.rollout_chunk_rows)) == 1
