"""Questions: the formats, the recipe, the order."""

import csv
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.data import Questions, load_questions
from grpo.errors import UserError
from grpo.prompts import Recipe, build, encode, fill, load_recipe, make_recipe, recipe_text, render
from grpo.types import Prompt
from tests.tiny import tiny_tokenizer

ROWS = [{"problem": f"{n}+{n}?", "gold": str(2 * n), "level": n} for n in range(1, 6)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))
    return str(path)


def settings(**values):
    return Config(model="m", question_column="problem", answer_column="gold", rewards={"r": 1}, **values)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_formats_give_the_same_questions(tmp_path, kind):
    cfg = settings(data=write(tmp_path, kind), prompt_template="Level {level}: {question} =")
    questions = load_questions(cfg, make_recipe(cfg, tiny_tokenizer()), tiny_tokenizer())
    assert [item.text for item in questions.items] == [f"Level {n}: {n}+{n}? =" for n in range(1, 6)]
    assert [item.columns["answer"] for item in questions.items] == ["2", "4", "6", "8", "10"]
    assert all(tuple(tiny_tokenizer()(item.text)["input_ids"]) == item.token_ids for item in questions.items)
    assert questions.first_questions(2) == ["1+1?", "2+2?"]


def test_message_prompts_and_a_task_without_golds(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    cfg = Config(
        model="m", data=str(tmp_path / "rows.jsonl"), question_column="prompt", answer_column=None, system_prompt="S"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    [item] = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer).items
    assert item.text == "<system>S</system><user>hi</user><assistant>"
    assert item.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]


def test_long_prompts_are_dropped_with_a_count_never_cut(tmp_path):
    cfg = settings(data=write(tmp_path, "jsonl"), prompt_template="{question}", max_prompt_length=4)
    lengths = [len(tiny_tokenizer()(row["problem"])["input_ids"]) for row in ROWS]
    cfg_all = settings(data=cfg.data, max_prompt_length=max(lengths))
    assert load_questions(cfg_all, Recipe(), tiny_tokenizer()).num_dropped == 0
    short = settings(data=cfg.data, max_prompt_length=max(lengths) - 1)
    if min(lengths) < max(lengths):
        kept = load_questions(short, Recipe(), tiny_tokenizer())
        assert kept.num_dropped == sum(n == max(lengths) for n in lengths)
    else:
        with pytest.raises(UserError, match=r"every prompt .* \(5\) is longer"):
            load_questions(short, Recipe(), tiny_tokenizer())


def test_chat_template_is_used_when_there_is_one():
    tokenizer = tiny_tokenizer()
    assert not make_recipe(Config(), tokenizer).chat
    tokenizer.chat_template = CHAT
    recipe = make_recipe(Config(system_prompt='it\'s "so"'), tokenizer)
    text = render(recipe, build(recipe, "2+2?", {}), tokenizer)
    assert text == '<system>it\'s "so"</system><user>2+2?</user><assistant>'
    assert not make_recipe(Config(chat_template=False), tokenizer).chat
    plain = make_recipe(Config(chat_template=False, system_prompt="Think."), tokenizer)
    assert render(plain, build(plain, "2+2?", {}), tokenizer) == "Think.\n2+2?"


def test_a_template_that_refuses_is_one_clear_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    recipe = Recipe(chat=True)
    with pytest.raises(UserError, match="no system role"):
        render(recipe, build(recipe, "hi", {}), tokenizer)


def test_a_hostile_template_cannot_reach_python(tmp_path):
    """transformers renders in a sandbox: the canary stays unwritten."""
    canary = tmp_path / "canary"
    tokenizer = tiny_tokenizer()
    reach = "''.__class__.__mro__[1].__subclasses__()"
    tokenizer.chat_template = "{% for c in " + reach + " %}{{ c }}{% endfor %}" + f"{{{{ open('{canary}', 'w') }}}}"
    recipe = Recipe(chat=True)
    with pytest.raises(UserError):
        render(recipe, build(recipe, "hi", {}), tokenizer)
    assert not canary.exists()


def test_fill_leaves_other_braces_alone():
    assert fill('{question} as {"x": {level}}', {"question": "{level}", "level": 3}) == '{level} as {"x": 3}'


def test_recipe_round_trip(tmp_path):
    recipe = Recipe(system_prompt="小明 'quoted' \"twice\"\n", chat=True, questions=["?"])
    (tmp_path / "recipe.json").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.json").write_text('{"unknown": 1}')
    with pytest.raises(UserError, match="not a prompt recipe"):
        load_recipe(tmp_path / "recipe.json")


def test_special_tokens_are_the_templates_business():
    tokenizer = tiny_tokenizer()
    assert encode(Recipe(chat=True), "hi", tokenizer) == tokenizer("hi", add_special_tokens=False)["input_ids"]


@given(st.integers(1, 17), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 12))
def test_the_stream_deals_each_row_once_an_epoch(num_rows, num_prompts, seed, num_steps):
    """Any number of rows and prompts, also fewer rows than prompts; a step alone equals the same step in sequence."""
    stream = Questions([Prompt(i, "", (), {}) for i in range(num_rows)], 0, seed)
    dealt = [p.row for step in range(num_steps) for p in stream.prompts(step, num_prompts)]
    for epoch in range(len(dealt) // num_rows):
        assert sorted(dealt[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    last = stream.prompts(num_steps - 1, num_prompts)
    assert [p.row for p in last] == dealt[-num_prompts:]
