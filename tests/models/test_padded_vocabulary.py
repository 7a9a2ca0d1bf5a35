"""Ids behind the tokenizer's last one are neither sampled nor part of the softmax that training differentiates."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from grpo.config.settings import Config
from grpo.forward.logprobs import Scorer
from grpo.models.checks import check_vocabulary, stop_token_ids
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.training.collate import collate
from grpo.types import TrainRow
from tests.support.tiny import tiny_model, tiny_tokenizer

TOKENS, EMBEDDINGS = 300, 320
PROMPT = (5, 6, 7, 8)


def padded_model(architecture):
    """A model that prefers ids without a token."""
    model = tiny_model(architecture, EMBEDDINGS, spread=1.5)
    with torch.no_grad():
        model.get_output_embeddings().weight[TOKENS:] *= 3
    return model


def test_the_count_and_the_line():
    model, tokenizer, lines = padded_model("llama"), tiny_tokenizer(TOKENS), []
    count = max(tokenizer.get_vocab().values()) + 1
    assert check_vocabulary(model, tokenizer, rules=2, say=lines.append) == count
    assert lines == [f"model: 320 embeddings, {count} tokens: ids from {count} on are neither sampled nor trained"]
    assert check_vocabulary(model, tokenizer, rules=1) == EMBEDDINGS, "an older run keeps its rules"


def test_checkpoints_name_the_end_of_a_turn_for_other_programs(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = stop_token_ids(model, tokenizer)
    stops = stop_token_ids(model, tokenizer, "<|im_end|>")
    assert stops - before == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    model.save_pretrained(tmp_path)
    assert set(GenerationConfig.from_pretrained(tmp_path).eos_token_id) == stops


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # shared and padded cache
@pytest.mark.parametrize("how", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0)])
def test_they_are_not_sampled(architecture, how):
    model = padded_model(architecture)
    requests = [Request(g, 0, g, PROMPT) for g in range(8)]

    def drawn(count):
        rows = NativeEngine(model, [0], 24, 1, num_tokens=count).generate(requests, how)
        return max(int(row.token_ids.max(initial=0)) for row in rows)

    assert drawn(TOKENS) < TOKENS <= drawn(None), "the control samples them"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # the fused head, and blocks
def test_the_softmax_is_over_tokens_only(architecture):
    model = padded_model(architecture)
    cfg = Config(model="x", rewards={"a": 1.0}, device="cpu")
    scorer = Scorer(model, cfg)
    completion = torch.arange(9, 20)
    scorer.head.num_tokens = TOKENS
    ids = torch.cat([torch.tensor(PROMPT), completion])
    expected = model(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1, :TOKENS].log_softmax(-1)
    expected = expected.gather(-1, completion[:, None])[:, 0]
    row = TrainRow(0, PROMPT, completion.numpy(), np.zeros(len(completion)), None, advantage=1.0)
    found = scorer(collate([row], {0: 1.0}, torch.device("cpu")))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    model.zero_grad()
    found.sum().backward()
    gradient = model.get_output_embeddings().weight.grad
    assert float(gradient[TOKENS:].abs().max()) == 0.0 < float(gradient[:TOKENS].abs().max())
