"""Variables of the chat template: the text of transformers, in training, in the recipe, in SFT and in --show_prompt."""

import dataclasses
import json

import pytest
from transformers import PreTrainedTokenizerFast

from grpo.checkpoints.resume import check_same_run
from grpo.config.checks import check
from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.data.questions import load_questions
from grpo.data.recipe import Recipe, load_recipe, make_recipe, recipe_text, render
from grpo.data.show_prompt import show_prompt
from grpo.errors import UserError
from grpo.sft.texts import load_texts
from tests.support.tiny import save_tiny, tiny_tokenizer

THINKING = (  # as Qwen3's: without thinking, an empty block of thoughts stands before the answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    "{% if words %}{{ words.a[1] }}{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]
GOOD = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}}
KWARGS = [{"enable_thinking": False}, {"enable_thinking": True}, {"words": {"a": [1, "zwei"]}}, {}]


def thinking_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.mark.parametrize("kwargs", KWARGS)
def test_the_text_is_that_of_apply_chat_template(kwargs, tmp_path):
    """Also from a recipe that was written and read. The control: without thinking is another text than with it."""
    tokenizer = thinking_tokenizer()
    recipe = make_recipe(Config(model="m", chat_template_kwargs=kwargs), tokenizer)
    (tmp_path / "recipe.json").write_text(recipe_text(recipe), encoding="utf-8")
    theirs = tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True, **kwargs)
    assert render(load_recipe(tmp_path / "recipe.json"), HI, tokenizer) == render(recipe, HI, tokenizer) == theirs
    plain = render(make_recipe(Config(model="m"), tokenizer), HI, tokenizer)
    assert (theirs == plain) is (kwargs in ({}, {"enable_thinking": True}))


def test_the_token_that_ends_a_turn_is_found_with_them():
    """Without the variable this template refuses every conversation."""
    tokenizer = thinking_tokenizer()
    tokenizer.chat_template = (
        "{% if not words %}{{ raise_exception('no words') }}{% endif %}" + THINKING.split("{% if w")[0]
    )
    recipe = make_recipe(Config(model="m", chat_template_kwargs={"words": 1}), tokenizer)
    assert recipe.end_of_turn == "<|im_end|>"
    assert make_recipe(Config(model="m"), tokenizer).end_of_turn is None


def test_a_recipe_of_an_older_checkpoint_has_none(tmp_path):
    older = {name: value for name, value in dataclasses.asdict(Recipe(chat=True)).items() if "kwargs" not in name}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    assert load_recipe(tmp_path / "recipe.json").chat_template_kwargs == {}


@pytest.mark.parametrize("kwargs", [{"messages": []}, {"chat_template": "{{ 1 }}"}, [1], {"a b": 1}, {"bos_token": ""}])
def test_a_recipe_cannot_replace_what_the_template_is_given(kwargs, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({**dataclasses.asdict(Recipe()), "chat_template_kwargs": kwargs}))
    with pytest.raises(UserError, match="chat_template_kwargs has a wrong type or value"):
        load_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "eos_token", "strftime_now"],
)
def test_names_that_the_template_gets_already_are_refused(name):
    with pytest.raises(UserError, match=f"^chat_template_kwargs: {name} is given to every template by the trainer"):
        check(Config(**GOOD, chat_template_kwargs={name: True}))


@pytest.mark.parametrize("kwargs", [{"a": float("nan")}, {"a": {1: 2}}, {"a-b": 1}, {"": 1}, {1: 1}, {"a": {1, 2}}])
def test_values_are_those_of_json(kwargs):
    with pytest.raises(UserError, match=r"^chat_template_kwargs: "):
        check(Config(**GOOD, chat_template_kwargs=kwargs))


def test_what_would_have_no_effect_is_refused():
    """A slip in the name, a tokenizer without a template, chat_template false; and a token of this tokenizer."""
    tokenizer = thinking_tokenizer()

    def refused(said, tokenizer=tokenizer, **kwargs):
        with pytest.raises(UserError, match=f"^chat_template_kwargs: {said}"):
            make_recipe(Config(model="m", chat_template_kwargs=kwargs), tokenizer)

    refused("the chat template of 'm' does not read 'enable_thinkin'", enable_thinkin=False)
    refused("the tokenizer of 'm' has no chat template that could read calm", tiny_tokenizer(), calm=1)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, extra_special_tokens={"words": "<|im_end|>"})
    own.chat_template = THINKING
    refused("words is given to the template by the tokenizer", own, words=1)
    with pytest.raises(UserError, match="has no effect beside chat_template false"):
        check(Config(**GOOD, chat_template=False, chat_template_kwargs={"calm": 1}))


@pytest.mark.parametrize(
    "words",
    [["--chat_template_kwargs", "{enable_thinking: false}"], ["--chat_template_kwargs.enable_thinking", "false"]],
)
def test_on_the_command_line(words):
    cfg, _ = load_config(["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1}', *words])
    assert cfg.chat_template_kwargs == {"enable_thinking": False}


def test_a_run_cannot_go_on_with_others():
    cfg = Config(model="m", chat_template_kwargs={"enable_thinking": False})
    state = {"config": json.loads(json.dumps(dataclasses.asdict(cfg)))}
    check_same_run("output/checkpoint_1", state, cfg, {})
    older = {"config": {"model": "m"}}
    check_same_run("output/checkpoint_1", older, Config(model="m"), {})
    for saved in (older, {"config": {"model": "m", "chat_template_kwargs": {"enable_thinking": True}}}):
        with pytest.raises(UserError, match="chat_template_kwargs: "):
            check_same_run("output/checkpoint_1", saved, cfg, {})


def test_show_prompt_and_supervised_texts_use_them(tmp_path, capsys):
    save_tiny(tmp_path / "base", "qwen3")
    (tmp_path / "template.jinja").write_text(THINKING)
    (tmp_path / "rows.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    settings = {
        "model": tmp_path / "base",
        "data": tmp_path / "rows.jsonl",
        "chat_template_file": tmp_path / "template.jinja",
        "chat_template_kwargs": "{enable_thinking: false}",
        "rewards": '{"mark_reward": 1}',
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    capsys.readouterr()
    assert show_prompt([*words, "--show_prompt", "0"]) == 0
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert capsys.readouterr().out == prompt + "\n"
    cfg, _ = load_config(words)
    cfg = dataclasses.replace(cfg, sft={"solution_column": "answer"})
    tokenizer = tiny_tokenizer()
    recipe = make_recipe(cfg, tokenizer)
    texts = load_texts(cfg, recipe, tokenizer, load_questions(cfg, recipe, tokenizer), frozenset({0}))
    assert texts.questions.items[0].text == prompt
    assert tokenizer.decode(texts.solutions[0]).startswith("4<|im_end|>")
