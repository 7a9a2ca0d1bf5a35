"""The engine and the trainer compute one function, on six architectures.

Greedy tokens equal those of transformers.generate; log-probs of sampled tokens equal those of the training forward. The
models are random and their choices spread over 300 tokens, so that equality by chance is impossible.
"""

import numpy as np
import pytest
import torch

from grpo.config.settings import Config
from grpo.forward.logprobs import Head, Scorer
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.training.collate import collate
from grpo.types import TrainRow
from tests.support.tiny import ARCHITECTURES, tiny_model

PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 20, 11)]  # 20 tokens: beyond the Gemmas' window of 8
NEW_TOKENS = 24


def ask(model, sampling, stop_ids=(0,), num_generations=4, new_tokens=NEW_TOKENS):
    engine = NativeEngine(model, stop_ids, new_tokens, seed=3)
    requests = [
        Request(p * num_generations + g, p, g, ids) for p, ids in enumerate(PROMPTS) for g in range(num_generations)
    ]
    return engine.generate(requests, sampling)


def rows_of(completions, num_generations=4):
    return [
        TrainRow(c.row, PROMPTS[c.row // num_generations], c.token_ids, c.sampler_logprobs, c.support, 1.0)
        for c in completions
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate(architecture):
    model = tiny_model(architecture)
    stop_ids = [0, 7, 19]  # several EOS ids, so that rows finish at different times and leave the batch
    ours = ask(model, Sampling(temperature=0.0), stop_ids, num_generations=2)
    lengths = set()
    for completion in ours:
        prompt = torch.tensor([PROMPTS[completion.row // 2]])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=stop_ids,
            pad_token_id=0,
        )
        theirs = generated[0, prompt.shape[1] :].tolist()
        assert completion.token_ids.tolist() == theirs
        assert completion.finish == ("stop" if theirs[-1] in stop_ids else "length")
        lengths.add(len(theirs))
    assert max(lengths) > 1, "every model stopped at once: nothing was compared"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_p=0.9, max_support=40), Sampling(temperature=1.3, top_k=5)],
    ids=["plain", "top_p", "top_k"],
)
def test_ratio_is_one_on_policy(architecture, sampling):
    """max |ratio - 1| <= 1e-5 in fp32; scoring at another temperature (the control) is far off."""
    model = tiny_model(architecture, spread=2.0)
    completions = ask(model, sampling)
    assert len({tuple(c.token_ids.tolist()) for c in completions}) > 6, "sampling is degenerate"
    micro = collate(rows_of(completions), dict.fromkeys(range(12), 1.0), torch.device("cpu"))
    with torch.no_grad():
        logprobs = Scorer(model, Config(temperature=sampling.temperature))(micro)
        control = Scorer(model, Config(temperature=sampling.temperature * 1.1))(micro)
    ratio = ((logprobs - micro.sampler_logprobs).exp() - 1).abs()
    assert float(ratio.max()) <= 1e-5
    assert float(((control - micro.sampler_logprobs).exp() - 1).abs().max()) > 1e-3


def test_a_row_does_not_depend_on_its_neighbours():
    """The same request alone and among longer prompts: the same tokens, log-probs to 1e-5."""
    model = tiny_model("qwen3", spread=2.0)
    engine = NativeEngine(model, [0], NEW_TOKENS, seed=3)
    among = ask(model, Sampling())
    for sample in (0, 5, 11):
        [alone] = engine.generate([Request(sample, sample // 4, sample % 4, PROMPTS[sample // 4])], Sampling())
        assert alone.token_ids.tolist() == among[sample].token_ids.tolist()
        np.testing.assert_allclose(alone.sampler_logprobs, among[sample].sampler_logprobs, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_in_blocks_is_the_models_own(architecture):
    """Soft caps, scales and biases included: no architecture falls back to whole logits."""
    model = tiny_model(architecture)
    head = Head(model)
    assert head.usable
    hidden = head.body()(input_ids=torch.arange(5, 15)[None]).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(input_ids=torch.arange(5, 15)[None]).logits)
