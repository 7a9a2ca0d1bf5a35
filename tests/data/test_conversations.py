"""Data sets of verl and TRL: prompts as messages, gold answers inside of a mapping, further columns for the rewards."""

import json

import datasets
import pytest

from grpo.config.settings import Config
from grpo.config.sft_section import SftSettings
from grpo.data.questions import load_questions
from grpo.data.recipe import make_recipe
from grpo.errors import UserError
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import open_rewards
from grpo.sft.texts import solution_of
from tests.support.asking_rewards import answers_of
from tests.support.tiny import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


VERL = [  # the shape of verl's parquet files
    {
        "data_source": "sums",
        "prompt": [user(f"{n}+{n}?")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
        "extra_info": {"split": "train", "index": n, "answer": f"{n} twice\n#### {2 * n}"},
    }
    for n in range(1, 4)
]
TRL = [  # prompt-only, conversational, as trl-lib's sets
    {"prompt": [system("Be short."), user("1+1?"), {"role": "assistant", "content": "2"}, user("2+2?")],
     "solution": "4"},
    {"prompt": [user("3+3?")], "solution": "6"},
]  # fmt: skip


def write(folder, rows, kind):
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(data, held_out=False, **values):
    cfg = Config(model="m", rewards={"r": 1}, data=data, **{"question_column": "prompt", **values})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer, held_out)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_verl_with_one_setting_for_the_question_and_one_for_the_answer(tmp_path, kind):
    data = write(tmp_path, VERL, kind)
    questions = load(data, answer_column="reward_model.ground_truth", id_column="extra_info.index")
    assert [item.text for item in questions.items] == [f"<user>{n}+{n}?</user><assistant>" for n in (1, 2, 3)]
    assert [item.columns["answer"] for item in questions.items] == ["2", "4", "6"]
    assert [item.reference for item in questions.items] == ["2", "4", "6"]
    first = questions.items[0].columns
    assert first["data_source"] == "sums" and first["extra_info"] == VERL[0]["extra_info"]
    held_out = load("none.jsonl", True, eval_data=data, answer_column="reward_model.ground_truth")
    assert [item.token_ids for item in held_out.items] == [item.token_ids for item in questions.items]


def test_the_same_by_new_names_of_columns(tmp_path):
    """A part of a column becomes a column; a file that has the new name already stays as it is."""
    names = {"prompt": "question", "reward_model.ground_truth": "answer", "extra_info.index": "number"}
    data = write(tmp_path, VERL, "parquet")
    questions = load(data, question_column="question", column_names=names, prompt_template="{number}: {question}")
    assert [item.columns["answer"] for item in questions.items] == ["2", "4", "6"]
    assert [item.columns["number"] for item in questions.items] == [1, 2, 3]
    flat = tmp_path / "flat.jsonl"
    flat.write_text('{"question": "7+7?", "answer": "14", "number": 7}\n')
    [item] = load(
        str(flat), question_column="question", column_names=names, prompt_template="{number}: {question}"
    ).items
    assert (item.text, item.columns["answer"]) == ("<user>7: 7+7?</user><assistant>", "14")
    with pytest.raises(UserError, match=r"column_names: .* has no key 'gold' in column 'reward_model', only \['style'"):
        load(data, question_column="question", column_names={"reward_model.gold": "answer"})


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_trl_prompts_of_several_turns(tmp_path, kind):
    data = write(tmp_path, TRL, kind)
    questions = load(data, answer_column="solution")
    assert questions.items[0].text == (
        "<system>Be short.</system><user>1+1?</user><assistant>2</assistant><user>2+2?</user><assistant>"
    )
    assert [item.columns["answer"] for item in questions.items] == ["4", "6"]
    without = load(data, answer_column=None)
    assert "answer" not in without.items[0].columns and without.items[0].columns["solution"] == "4"


def test_a_system_turn_of_the_data_goes_before_the_setting_and_is_said(tmp_path, capsys):
    data = write(tmp_path, TRL, "jsonl")
    questions = load(data, answer_column=None, system_prompt="Think.")
    assert [item.text.split("</system>")[0] for item in questions.items] == ["<system>Be short.", "<system>Think."]
    assert "1 of 2 questions have a system turn of their own: no system_prompt there" in capsys.readouterr().err
    load(data, answer_column=None)
    load(write(tmp_path, VERL, "jsonl"), answer_column=None, system_prompt="Think.")
    assert capsys.readouterr().err == ""


def test_a_column_whose_name_has_a_dot_goes_before_a_part(tmp_path):
    rows = [{"prompt": [user("1?")], "a": {"b": "inner"}, "a.b": "outer"}]
    [item] = load(write(tmp_path, rows, "jsonl"), answer_column="a.b").items
    assert item.columns["answer"] == "outer"


def changed(**values):
    return [VERL[0], {**VERL[1], **values}]


@pytest.mark.parametrize(
    "rows, settings, said",
    [
        (changed(reward_model={"ground_truth": None}), {}, "row 2, column 'reward_model.ground_truth': expected "
         "a gold answer, got 'None'"),
        (changed(reward_model={"style": "rule"}), {}, "row 2, column 'reward_model.ground_truth': expected a gold"),
        (changed(reward_model=None), {}, "row 2, column 'reward_model.ground_truth': expected a gold answer"),
        (changed(reward_model={"ground_truth": {"a": 1}}), {}, "row 2, column 'reward_model.ground_truth': expected"),
        (VERL, {"answer_column": "reward_model.gold"}, "has no key 'gold' in column 'reward_model', only ['style', "),
        (VERL, {"answer_column": "data_source.gold"}, "has no key 'gold' in column 'data_source', only []"),
        (VERL, {"answer_column": "model.gold"}, "has no column 'model.gold', only ['data_source', 'prompt'"),
        (VERL, {"id_column": "extra_info.split"}, "rows 1 and 2, column 'extra_info.split': both have the id 'train'"),
        (changed(prompt=[user([{"type": "text", "text": "hi"}])]), {}, "row 2, column 'prompt': expected a question, "
         "got a turn whose content is a list of parts, and only text is read"),
        (changed(prompt=[system("only")]), {}, "row 2, column 'prompt': the conversation has no user turn with text"),
        (changed(prompt=None), {}, "row 2, column 'prompt': expected a question, got 'None'"),
        (changed(prompt=[]), {}, "row 2, column 'prompt': expected a question, got '[]'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_row_and_column(tmp_path, rows, settings, said):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, rows, "jsonl"), **{"answer_column": "reward_model.ground_truth", **settings})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_further_columns_reach_a_reward(tmp_path):
    """As they are in the data, mappings included, through a reward worker."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def source_reward(completions, answer, data_source, extra_info, **columns):\n"
        "    return [extra_info[0]['index'] + (data_source == ['sums']) / 2 + (answer == ['4']) / 4]\n"
    )
    questions = load(write(tmp_path, VERL, "parquet"), answer_column="reward_model.ground_truth")
    cfg = Config(model="m", data="d", rewards={f"{rewards}:source_reward": 1.0}, reward_workers=1)
    pool = open_rewards(cfg, print)
    try:
        samples = [RewardInput(item.text, "4", [1], item.columns) for item in questions.items[:2]]
        answers = answers_of(pool, samples, [Call(0, (0,)), Call(0, (1,))])
    finally:
        pool.close()
    assert [answer.outcomes for answer in answers] == [[1.5], [2.75]]


def test_a_part_of_a_column_is_the_solution_of_the_supervised_stage(tmp_path):
    questions = load(write(tmp_path, VERL, "parquet"), answer_column="reward_model.ground_truth")
    cfg = Config(answer_column="reward_model.ground_truth")
    item = questions.items[1]
    assert solution_of(item, SftSettings(solution_column="extra_info.answer"), cfg) == "2 twice\n#### 4"
    assert solution_of(item, SftSettings(solution_column="reward_model.ground_truth"), cfg) == "4"
    with pytest.raises(UserError, match="solution_column: the data has no key 'worked' in column 'extra_info'"):
        solution_of(item, SftSettings(solution_column="extra_info.worked"), cfg)
