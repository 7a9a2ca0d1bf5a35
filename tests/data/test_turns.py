"""Prompts that end inside a turn, special tokens at their ends, the date of a run, the token that ends a turn."""

import json
from datetime import datetime

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from grpo.config.settings import Config
from grpo.data.questions import load_questions
from grpo.data.recipe import Recipe, build, encode, encode_all, load_recipe, make_recipe, recipe_text, render
from grpo.errors import UserError
from grpo.models.checks import stop_token_ids
from grpo.training.scoring import Scoring
from grpo.types import Completion
from tests.support.tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
HI = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "It is "}


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- a conversation that ends with an assistant turn


@pytest.mark.parametrize("template", [CHATML, TRIMMED, NO_SYSTEM], ids=["chatml", "trimmed", "no system"])
@pytest.mark.parametrize("begun", ["It is ", "<think>\n", "", "a <|im_end|> b"])
def test_an_assistant_turn_is_continued_as_transformers_does(template, begun):
    tokenizer = tokenizer_with(template)
    turns = [HI, {"role": "assistant", "content": begun}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    text = render(Recipe(chat=True), turns, tokenizer)
    assert text == theirs and not text.endswith("<|im_end|>\n") and "assistant" in text
    closed = render(Recipe(chat=True, rules=1), turns, tokenizer)
    assert closed.endswith("<|im_start|>assistant\n"), (
        "the control: checkpoints of an older version are asked as before"
    )


def test_without_a_chat_template_the_turn_stays_open_too():
    assert render(Recipe(), [HI, BEGUN], tiny_tokenizer()) == "hi\nIt is "


ALTERED = {
    "upper case": CHATML.replace("m.content", "m.content | upper"),
    "thoughts cut": CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
    "dropped": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "the last is dropped": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_template_that_alters_the_turn_is_one_line_with_the_row(tmp_path, name):
    begun = {"role": "assistant", "content": "<think>a</think>b"}
    rows = [{"question": [HI], "answer": 1}, {"question": [HI, begun], "answer": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, tokenizer = Config(model="m", data=str(path)), tokenizer_with(ALTERED[name])
    with pytest.raises(UserError) as refused:
        load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)
    said = str(refused.value)
    assert "ends with an assistant turn" in said and "rows.jsonl, row 2)" in said and "\n" not in said
    assert len(said) < 400 and "End the question with a user turn" in said


@pytest.mark.parametrize("inputs", ["text", "messages"])
def test_rewards_get_what_was_sampled_and_the_begun_turn_in_the_prompt(tmp_path, inputs):
    """As TRL 1.16: the completion does not repeat the begun turn, the prompt ends with it."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": [HI, BEGUN], "answer": 1}) + "\n")
    cfg, tokenizer = Config(model="m", data=str(path), reward_inputs=inputs), tokenizer_with(CHATML)
    questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)

    class Rewards:
        rewards = ()

        def begin(self):
            pass

    ids = torch.tensor(tokenizer("4<|im_end|>")["input_ids"]).numpy().astype("int32")
    completion = Completion(0, ids, ids.astype("float32"), "stop")
    given = Scoring(cfg, Rewards(), questions.items, tokenizer, print)._input(completion)
    if inputs == "text":
        assert given.prompt.endswith("<|im_start|>assistant\nIt is ") and given.completion == "4"
    else:
        assert given.prompt == [HI, BEGUN] and given.completion == [{"role": "assistant", "content": "4"}]


# --- the system message


def test_the_system_message_goes_before_the_first_user_turn():
    cfg = Config(system_prompt="S", system_role="user", example_question="1+1?", example_answer="2")
    tokenizer = tokenizer_with(NO_SYSTEM)
    recipe = make_recipe(cfg, tokenizer)
    turns = build(recipe, "2+2?", {})
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "S\n\n1+1?"),
        ("assistant", "2"),
        ("user", "2+2?"),
    ]
    assert render(recipe, turns, tokenizer).startswith(
        "<|im_start|>user\nS\n\n1+1?<|im_end|>\n<|im_start|>assistant\n2"
    )
    own = [{"role": "system", "content": "own"}, HI]
    assert build(recipe, own, {})[0]["content"] == "own\n\n1+1?" and own[1] == HI, "the row stays as it is"
    none = make_recipe(Config(system_role="user"), tokenizer)
    assert build(none, "2+2?", {}) == [{"role": "user", "content": "2+2?"}]
    assert build(none, [own[0], HI], {}) == [{"role": "user", "content": "own\n\nhi"}]


def test_a_template_without_system_role_says_how_to_go_on():
    """Only where the system message is the reason (the controls): another reason gets other advice."""
    tokenizer, recipe = tokenizer_with(NO_SYSTEM), Recipe(chat=True, system_prompt="S")
    with pytest.raises(UserError, match=r"System role not supported\. .*--system_role user"):
        render(recipe, build(recipe, "hi", {}), tokenizer)
    with pytest.raises(UserError, match=r"roles must alternate\. .*--system_role user"):
        render(recipe, build(recipe, "hi", {}), tokenizer_with(ALTERNATE))
    with pytest.raises(UserError, match=r"roles must alternate\. Try --chat_template false"):
        render(recipe, build(recipe, [HI, HI], {}), tokenizer_with(ALTERNATE))
    with pytest.raises(UserError, match=r"roles must alternate\. Try --chat_template false"):
        render(Recipe(chat=True), [HI, HI], tokenizer_with(ALTERNATE))


PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [PARTS, "{{ messages | length }}", "Answer:"])
def test_a_template_that_leaves_the_question_out_is_refused(template):
    """As those of vision models do with plain text: every prompt would be the same. ChatML is the control."""
    with pytest.raises(UserError, match=r"leaves the user's text out .*--chat_template_file"):
        make_recipe(Config(), tokenizer_with(template))
    assert make_recipe(Config(), tokenizer_with(CHATML)).chat
    assert not make_recipe(Config(chat_template=False), tokenizer_with(template)).chat


# --- special tokens around plain text

BOS, EOS, MORE = 1, 0, 40
SINGLE = {
    "none": ([], []),
    "bos": ([BOS], []),
    "bos and eos": ([BOS], [EOS]),
    "eos": ([], [EOS]),
    "two and eos": ([MORE, BOS], [EOS]),
}


def adding(front, back):
    """The tiny tokenizer, which puts these ids around every text; <|im_end|> is its BOS."""
    tokenizer = tiny_tokenizer()
    name = {BOS: "<|im_end|>", EOS: "<|endoftext|>", MORE: tokenizer.convert_ids_to_tokens(MORE)}
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=[*(name[i] for i in front), "$A", *(name[i] for i in back)],
        special_tokens=[(text, i) for i, text in name.items()],
    )
    return tokenizer


@pytest.mark.parametrize("name", SINGLE)
def test_special_tokens_stand_once_before_and_never_behind_a_prompt(name):
    front, back = SINGLE[name]
    tokenizer = adding(front, back)
    plain = tokenizer("Zq", add_special_tokens=False)["input_ids"]
    begun = tokenizer("<|im_end|>Zq", add_special_tokens=False)["input_ids"]
    assert tokenizer("Zq")["input_ids"] == front + plain + back, "the control: the tokenizer adds them"
    assert encode(Recipe(), "Zq", tokenizer) == front + plain
    assert encode(Recipe(), "<|im_end|>Zq", tokenizer) == (front[:-1] if front else []) + begun
    assert encode(Recipe(), "Zq<|endoftext|>", tokenizer) == [*front, *plain, EOS], "written by the user: stays"
    assert encode(Recipe(rules=1), "Zq", tokenizer) == front + plain + back, "older checkpoints are asked as before"
    assert encode(Recipe(chat=True), "Zq", tokenizer) == plain
    assert encode_all(Recipe(), ["Zq", "<|im_end|>Zq"], tokenizer)[0] == front + plain


def test_texts_to_learn_begin_like_prompts(tmp_path):
    """SFT: one BOS, and EOS after the solution only."""
    from grpo.sft.texts import load_texts
    from tests.sft.test_sft import config

    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "<|im_end|>Zq", "answer": "Zk"}\n{"question": "Zq", "answer": "Zk"}\n')
    tokenizer = adding([BOS], [EOS])
    cfg = config(data=str(path), solution_column="answer")
    recipe = make_recipe(cfg, tokenizer)
    texts = load_texts(cfg, recipe, tokenizer, load_questions(cfg, recipe, tokenizer), frozenset({EOS}))
    plain = tokenizer("Zq", add_special_tokens=False)["input_ids"]
    answer = tokenizer("Zk", add_special_tokens=False)["input_ids"]
    for row in texts.all():
        assert [*row.prompt_ids, *row.token_ids.tolist()] == [BOS, *plain, *answer, EOS]


# --- the date


DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}"


def test_the_date_is_the_recipes():
    tokenizer = tokenizer_with(DATED)
    recipe = make_recipe(Config(), tokenizer, {"date": "2024-02-29T23:59:58"})
    assert render(recipe, [HI], tokenizer) == "2024-02-29 23:59:58 hi"
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%d %B %Y, %A') }}{% endif %}"
    assert render(recipe, [HI], tokenizer) == "29 February 2024, Thursday"
    today = render(Recipe(chat=True), [HI], tokenizer)
    assert today == datetime.now().strftime("%d %B %Y, %A") != "29 February 2024, Thursday", "the control"


def test_the_date_is_kept_with_the_recipe(tmp_path):
    recipe = Recipe(date="2024-02-29T23:59:58", end_of_turn="<|im_end|>")
    (tmp_path / "recipe.json").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.json").write_text("{}")
    older = load_recipe(tmp_path / "recipe.json")
    assert (older.date, older.end_of_turn, older.rules, older.system_role) == (None, None, 1, "system")
    for bad in ({"date": "soon"}, {"date": 3}, {"rules": 3}, {"rules": True}, {"end_of_turn": 1}, {"system_role": "x"}):
        (tmp_path / "recipe.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match="is not a prompt recipe"):
            load_recipe(tmp_path / "recipe.json")


# --- the token that ends a turn

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}%END{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "after a line break": (MARKED.replace("%END", "\n<|im_end|>\n"), "<|im_end|>"),
    "two tokens": (MARKED.replace("%END", "<|im_end|>\n<|endoftext|>"), "<|im_end|>"),
    "eos": (MARKED.replace("%END", "{{ eos_token }}"), "<|endoftext|>"),
    "between turns": (MARKED.replace("%END", "{% if not loop.last %}<|im_end|>{% endif %}"), "<|im_end|>"),
    "last and other turns": (
        MARKED.replace("%END", "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}"),
        "<|endoftext|>",
    ),
    "no token": (MARKED.replace("%END", "<|end|>"), None),
    "words": (MARKED.replace("%END", "\n"), None),
    "nothing": (MARKED.replace("%END", ""), None),
    "refuses": ("{{ raise_exception('no') }}", None),
    "answers changed": (MARKED.replace("m.content", "m.content | upper"), None),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_turn_is_read_off_the_template(name):
    template, token = ENDS[name]
    assert make_recipe(Config(), tokenizer_with(template)).end_of_turn == token
    assert make_recipe(Config(chat_template=False), tokenizer_with(template)).end_of_turn is None
    assert make_recipe(Config(), tokenizer_with(template), {"end_of_turn": None}).end_of_turn is None, "an older run"


def test_it_is_no_part_of_the_text_that_rewards_get():
    """Where the tokenizer does not call it special; an older run (the control) keeps its texts."""
    for kept, text in ((None, "4"), ({"end_of_turn": None}, "4<|end|>")):
        tokenizer = tokenizer_with(MARKED.replace("%END", "<|end|>"))
        tokenizer.add_tokens(["<|end|>"])
        ids, size = tokenizer("4<|end|>")["input_ids"], len(tokenizer)
        make_recipe(Config(), tokenizer, kept)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer("4<|end|>")["input_ids"] == ids and len(tokenizer) == size


def test_it_is_added_to_the_stop_tokens_and_said():
    tokenizer, model, said = tiny_tokenizer(), tiny_model("qwen3"), []
    assert stop_token_ids(model, tokenizer) == {0}, "the control"
    assert stop_token_ids(model, tokenizer, "<|im_end|>", said.append) == {0, 1}
    assert said == [
        "completions also end at <|im_end|>, which ends a turn in the chat template; the model's own: <|endoftext|>"
    ]
    for nothing_new in (None, "<|endoftext|>", "<|eot_id|>"):
        model = tiny_model("qwen3")
        assert stop_token_ids(model, tokenizer, nothing_new, said.append) == {0} and len(said) == 1
