"""Values of JSON: each row's own, whatever other rows of the column hold; decoded at any depth where stored as JSON.

The control of every case is `datasets` alone, which gives a column one type: it changes the values.
"""

import json

import datasets
import pytest

from grpo.checkpoints.fingerprints import fingerprints
from grpo.checkpoints.resume import check_same_run
from grpo.config.settings import Config
from grpo.data.questions import load_questions
from grpo.data.recipe import make_recipe
from grpo.data.sources import load_rows
from grpo.errors import UserError
from tests.support.tiny import tiny_tokenizer

TURN = {"role": "user", "content": "2+2?"}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def written(folder, rows, kind="jsonl"):
    path = folder / f"rows.{kind}"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if kind == "jsonl" else f"[{', '.join(lines)}]")
    return path


def items_of(path, chat=None, **values):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    cfg = Config(model="m", data=str(path), rewards={"r": 1}, **values)
    return load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer).items


def by_datasets(path):
    """What the library makes of the file, without decoding."""
    return datasets.load_dataset("json", data_files=str(path), split="train")


VALUES = {
    "number and word": ([2, "Paris"], ["2", "Paris"]),
    "digits in quotes": ([2, "007", "1.50"], ["2", "007", "1.50"]),
    "whole and not": ([2, 2.5, 10**15], ["2", "2.5", "1000000000000000"]),
    "dates": (["2024-01-01", "2024-02-03"], ["2024-01-01", "2024-02-03"]),
    "words of JSON": ([1, "null", "true", '"q"'], ["1", "null", "true", '"q"']),
    "many digits": ([0.12345678901234568, "x"], ["0.12345678901234568", "x"]),
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", VALUES)
def test_a_gold_answer_is_what_its_row_says(tmp_path, name, kind):
    cells, golds = VALUES[name]
    path = written(tmp_path, [{"question": "?", "answer": cell} for cell in cells], kind)
    assert [item.columns["answer"] for item in items_of(path)] == golds


def test_datasets_alone_would_change_them(tmp_path):
    """The control."""
    path = written(tmp_path, [{"answer": 2}, {"answer": 2.5}])
    assert [str(cell) for cell in by_datasets(path)["answer"]] == ["2.0", "2.5"]


def test_the_types_of_a_late_row_change_nothing_before_it(tmp_path):
    rows = [{"question": "?", "answer": n} for n in range(3000)] + [{"question": "?", "answer": "Paris", "more": [1]}]
    items = items_of(written(tmp_path, rows))
    assert [item.columns["answer"] for item in items[-2:]] == ["2999", "Paris"]
    assert items[0].columns["more"] is None and items[-1].columns["more"] == [1]


def test_other_columns_keep_their_values_at_any_depth(tmp_path):
    cells = [{"a": {"b": [1, "x"]}}, {"a": {"c": None}}, [1, [2.0, "y"]], "text", 7]
    path = written(tmp_path, [{"question": "?", "answer": "1", "cell": cell} for cell in cells])
    assert [item.columns["cell"] for item in items_of(path)] == cells


def test_objects_are_gold_answers_of_the_format_json(tmp_path):
    rows = [{"question": "?", "answer": {"a": 1}}, {"question": "?", "answer": {"b": "é"}}]
    path = written(tmp_path, [*rows, {"question": "?", "answer": '{"c": 2}'}])
    golds = [item.columns["answer"] for item in items_of(path, answer_format="json")]
    assert golds == ['{"a":1}', '{"b":"é"}', '{"c": 2}']
    with pytest.raises(UserError, match="row 1, column 'answer': expected a gold answer, got "):
        items_of(path)


def test_conversations_beside_plain_questions_and_turns_with_more_keys(tmp_path):
    questions = [
        [TURN],
        "3+3?",
        [{**TURN, "name": "Mia", "weight": 1}, {"role": "assistant", "content": "4", "weight": 0}, TURN],
        [TURN, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, {"role": "tool", "content": "4"}],
    ]
    path = written(tmp_path, [{"question": question, "answer": "1"} for question in questions])
    first, plain, more, tools = items_of(path, CHAT)
    assert first.text == "<user>2+2?<assistant>" and plain.text == "<user>3+3?<assistant>"
    assert more.text == "<user>2+2?<assistant>4<user>2+2?<assistant>"
    assert more.messages == questions[2] and tools.text.endswith("<tool>4<assistant>")
    assert items_of(path)[2].text == "2+2?\n4\n2+2?", "without a chat template"


@pytest.mark.parametrize(
    "question", [[{"role": "user"}], [{"content": "a"}], ["a"], [], {"role": "user"}, 7, [TURN, 3]]
)
def test_what_is_no_question_is_named(tmp_path, question):
    path = written(tmp_path, [{"question": "fine", "answer": 1}, {"question": question, "answer": "x"}])
    with pytest.raises(UserError, match=r"row 2, column 'question': expected a question, got .*role and content"):
        items_of(path)


@pytest.mark.parametrize(
    "question",
    [
        [{"role": "system", "content": "S"}],
        [{"role": "assistant", "content": "It is"}],
        [{"role": "system", "content": "S"}, {"role": "assistant", "content": "It"}],
        [{"role": "user", "content": " \n"}],
    ],
)
def test_a_conversation_without_a_user_turn_is_refused(tmp_path, question):
    path = written(tmp_path, [{"question": [TURN], "answer": 1}, {"question": question, "answer": "x"}])
    with pytest.raises(UserError, match="row 2, column 'question': the conversation has no user turn with text"):
        items_of(path)


# --- columns that datasets stores as JSON

CELLS = [{"answer": 2, "deep": [{"a": 1}]}, {"answer": "Paris", "deep": [{"a": "x"}, {"b": [None]}]}]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_json_columns_of_datasets_are_decoded_at_any_depth(tmp_path, kind):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    rows = [{"question": "?", "picture": None, **cell} for cell in CELLS]
    stored = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    features = stored.features.copy()
    features["picture"] = datasets.Image()
    stored = stored.cast(features)
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
    stored.to_parquet(str(path)) if kind == "parquet" else stored.save_to_disk(str(path))
    items = items_of(path)
    assert [item.columns["answer"] for item in items] == ["2", "Paris"]
    assert [item.columns["deep"] for item in items] == [cell["deep"] for cell in CELLS]


def test_bad_json_inside_a_column_is_named(tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    import pyarrow as pa

    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Json()})
    for spoiled, said in (
        ("{", "not valid JSON"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("NaN", "not valid JSON"),
    ):
        cells = pa.array(["1", spoiled], pa.string()).cast(pa.json_(pa.string()))
        table = pa.table({"question": ["a", "b"], "answer": cells})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        datasets.Dataset(table.cast(features.arrow_schema)).cast(features).save_to_disk(str(folder))
        with pytest.raises(UserError, match=f"row 2, column 'answer': .*{said}"):
            load_rows(str(folder), "train")


# --- runs of an older version

OLD = {"number and word": ["2", '"Paris"'], "whole and not": ["2.0", "2.5"]}


@pytest.mark.parametrize("name, cells", [("number and word", [2, "Paris"]), ("whole and not", [2, 2.5])])
def test_an_older_run_with_other_values_is_refused_by_name(tmp_path, name, cells):
    """Its golds are part of its fingerprint; where no value changed, the fingerprint is the same (the control)."""
    path = written(tmp_path, [{"question": "?", "answer": cell, "n": n} for n, cell in enumerate(cells)])
    (tmp_path / "model").mkdir()
    cfg = Config(model=str(tmp_path / "model"), data=str(path), rewards={"r": 1})
    questions = load_questions(cfg, make_recipe(cfg, tiny_tokenizer()), tiny_tokenizer())
    now = fingerprints(cfg, questions, [], tiny_tokenizer())
    for item, gold in zip(questions.items, OLD[name], strict=True):
        item.columns["answer"] = gold
    then = fingerprints(cfg, questions, [], tiny_tokenizer())
    with pytest.raises(UserError, match="data has changed"):
        check_same_run(tmp_path, {"config": {**vars(cfg)}, **then}, cfg, now)
    check_same_run(tmp_path, {"config": {**vars(cfg)}, **now}, cfg, now)


def test_an_ordinary_file_gives_the_values_of_datasets(tmp_path):
    """So runs on such files resume: same columns in the fingerprint."""
    rows = [
        {"question": f"{n}?", "answer": str(n), "level": n, "p": n / 4, "ok": n > 1, "tags": ["a"]} for n in range(3)
    ]
    path = written(tmp_path, [*rows, {"question": "x", "answer": "y"}])
    assert load_rows(str(path), "train").to_list() == by_datasets(path).to_list()
