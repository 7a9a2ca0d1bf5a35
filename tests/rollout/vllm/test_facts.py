"""What a server says of its model, against the trained one."""

from contextlib import nullcontext
from functools import partial

import pytest

from grpo.errors import UserError
from grpo.rollout.vllm.engine import check_facts
from tests.rollout.vllm.asking import Trainer

FACTS = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 301,
    "architecture": "LlamaForCausalLM",
    "max_model_len": 43,
    "dtype": "float64",
}


@pytest.mark.parametrize("name", FACTS)
def test_a_server_of_another_model_is_refused(tiny_folder, stand_in, name):
    """With what differs; the facts as they are (the control) pass."""
    server = stand_in()
    trainer = Trainer(tiny_folder, [server], max_prompt_length=32)
    checked = partial(check_facts, url=server.url, cfg=trainer.cfg, config=trainer.model.config)
    checked(server.facts(), tokenizer=trainer.tokenizer)
    with pytest.raises(UserError, match=f"{server.url} .*{FACTS[name]}"):
        checked(server.facts() | {name: FACTS[name]}, tokenizer=trainer.tokenizer)


def test_another_tokenizer_is_refused_where_stop_strings_need_it(tiny_folder, stand_in):
    server = stand_in()
    for stop in ([], ["a"]):
        trainer = Trainer(tiny_folder, [server], stop=stop, max_prompt_length=32)
        checked = partial(check_facts, url=server.url, cfg=trainer.cfg, config=trainer.model.config)
        checked(server.facts(), tokenizer=trainer.tokenizer)
        trainer.tokenizer.add_tokens(["another"])
        with pytest.raises(UserError, match="another tokenizer") if stop else nullcontext():
            checked(server.facts(), tokenizer=trainer.tokenizer)


@pytest.mark.parametrize("copies", [0, -1, 10**9, True, None])
def test_a_number_of_copies_that_is_none(tiny_folder, stand_in, copies):
    server = stand_in()
    server.change_facts = lambda facts: facts | {"copies": copies}
    trainer = Trainer(tiny_folder, [server])
    trainer.send()
    (line,) = trainer.problems
    assert server.url in line and "malformed (copies" in line
