"""Questions: the formats, the recipe, the order."""

import csv
import io
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grpo.config.settings import Config
from grpo.data.questions import Questions, length_summary, load_questions
from grpo.data.recipe import Recipe, build, encode, fill, load_recipe, make_recipe, recipe_text, render
from grpo.errors import UserError
from grpo.sft.texts import load_texts
from grpo.types import Prompt
from tests.support.tiny import tiny_tokenizer

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
    recipe = Recipe(system_prompt="小明 'quoted' \"twice\"\n", chat=True, questions=["?"], stop=["\n\n"])
    (tmp_path / "recipe.json").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    for wrong in ('{"unknown": 1}', '{"stop": "abc"}', '{"stop": [""]}', '{"stop": [1]}'):
        (tmp_path / "recipe.json").write_text(wrong)
        with pytest.raises(UserError, match="not a prompt recipe"):
            load_recipe(tmp_path / "recipe.json")


def test_special_tokens_are_the_templates_business():
    tokenizer = tiny_tokenizer()
    assert encode(Recipe(chat=True), "hi", tokenizer) == tokenizer("hi", add_special_tokens=False)["input_ids"]


@given(st.integers(1, 17), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 12))
def test_the_stream_deals_each_row_once_an_epoch(num_rows, num_prompts, seed, num_steps):
    """Any number of rows and prompts, also fewer rows than prompts; a step alone equals the same step in sequence."""
    stream = Questions([Prompt(i, "", (), {}) for i in range(num_rows)], 0, seed)
    dealt = [p.data_row for step in range(num_steps) for p in stream.prompts(step, num_prompts)]
    for epoch in range(len(dealt) // num_rows):
        assert sorted(dealt[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    last = stream.prompts(num_steps - 1, num_prompts)
    assert [p.data_row for p in last] == dealt[-num_prompts:]


@given(st.integers(1, 17), st.integers(1, 9), st.integers(0, 40))
def test_without_shuffle_the_stream_is_the_file_again_and_again(num_rows, num_prompts, step):
    """By position in the stream; the control: a shuffled stream of this size has another order for some seed."""
    items = [Prompt(i, "", (), {}) for i in range(num_rows)]
    stream = Questions(items, 0, seed=3, shuffle=False)
    wanted = [(step * num_prompts + i) % num_rows for i in range(num_prompts)]
    assert [p.data_row for p in stream.prompts(step, num_prompts)] == wanted
    if num_rows > 2:
        orders = [Questions(items, 0, seed).prompts(0, num_rows) for seed in range(8)]
        assert any(order != stream.prompts(0, num_rows) for order in orders)


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffle_reaches_questions_and_texts(tmp_path, shuffle):
    """Also where a part is held out and texts are left out: ten are in order by chance once in 3.6 million."""
    rows = [{"question": f"q{i}", "answer": "a" * (300 if i % 6 == 5 else 2)} for i in range(14)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"solution_column": "answer"}
    cfg = Config(
        model="m",
        data=str(tmp_path / "rows.jsonl"),
        shuffle=shuffle,
        max_generate_length=20,
        eval_split_size=2,
        sft=sft,
    )
    tokenizer = tiny_tokenizer()
    recipe = make_recipe(cfg, tokenizer)
    questions = load_questions(cfg, recipe, tokenizer)
    texts = load_texts(cfg, recipe, tokenizer, questions, frozenset({0})).questions
    assert len(texts.items) < len(questions.items) == 12
    for stream in (questions, texts):
        numbers = [int(prompt.columns["question"][1:]) for prompt in stream.prompts(0, len(stream.items))]
        assert (numbers == sorted(numbers)) is not shuffle and len(set(numbers)) == len(stream.items)


# --- columns of all kinds

CHOICE = "題目,選項A,選項B,選項C,選項D,推理正確答案,正確答案"


def columns_of(path, **values):
    """What rewards see of each row, for a file read with these settings."""
    cfg = Config(model="m", data=str(path), rewards={"r": 1}, max_prompt_length=10**6, **values)
    return load_questions(cfg, make_recipe(cfg, tiny_tokenizer()), tiny_tokenizer()).items


def test_chinese_choices_with_stray_columns_bom_and_crlf(tmp_path):
    """Cells stay what is written: 007, NA and None are options, not numbers and gaps."""
    lines = [CHOICE + ",,", ' 哪一個？,007,NA,None,"1,450",因為,b. NA,,', "另一個？,1.50,x,y,z,因為, D,,"]
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    first, second = columns_of(
        tmp_path / "rows.csv",
        question_column="題目",
        answer_column="正確答案",
        answer_format="letter",
        prompt_template="{question}|{選項A}|{選項B}|{選項C}|{選項D}",
        strip_cells=True,
    )
    assert first.text == "哪一個？|007|NA|None|1,450" and second.text == "另一個？|1.50|x|y|z"
    assert [item.columns["answer"] for item in (first, second)] == ["B", "D"]
    assert first.columns["推理正確答案"] == "因為" and "" not in first.columns
    assert first.columns["question"] == " 哪一個？", "rewards see the cell as it is"


def test_english_choices_take_the_names_of_the_chinese_ones(tmp_path):
    """A mapping renames columns, and leaves alone a file that has the wanted names already."""
    names = {"Question": "題目", **{f"Option {letter}": f"選項{letter}" for letter in "ABCD"}}
    english, chinese = tmp_path / "english.csv", tmp_path / "chinese.csv"
    english.write_text("ID,Question,Option A,Option B,Option C,Option D,Gold,,\r\n7,Q?,1,2,3,4,C,,\r\n")
    chinese.write_text("ID,題目,選項A,選項B,選項C,選項D,Gold\n7,Q?,1,2,3,4,C\n")
    settings = dict(
        column_names=names,
        question_column="題目",
        answer_column="Gold",
        id_column="ID",
        prompt_template="{題目} {選項A}{選項B}{選項C}{選項D}",
    )
    for path in (english, chinese):
        [item] = columns_of(path, **settings)
        assert item.text == "Q? 1234" and item.columns["answer"] == "C"
    with pytest.raises(UserError, match=r"has no column 'Option E', only \['ID', 'Question'"):
        columns_of(english, **{**settings, "column_names": {**names, "Option E": "選項E"}})
    (tmp_path / "both.csv").write_text("Question,題目,Gold\nQ?,Q?,A\n")
    with pytest.raises(UserError, match="both columns 'Question' and '題目'"):
        columns_of(
            tmp_path / "both.csv", column_names={"Question": "題目"}, question_column="題目", answer_column="Gold"
        )


@pytest.mark.parametrize(
    "content, settings, said",
    [
        (b"q,a\nx,E\n", {"answer_format": "letter"}, "row 1, column 'a': expected a letter, A to D, got 'E'"),
        (b"q,a\nx,A\ny,\nz,\n", {"answer_format": "letter"}, "row 2, column 'a': expected a letter, A to D, got '' (2"),
        (b"q,a\nx,A\ny, \n", {}, "row 2, column 'a': expected a gold answer"),
        (b"q,a\nx,1\n,2\n", {}, "row 2, column 'q': expected a question"),
        (b"q,a,id\nx,1,7\ny,1,8\nz,1,7 \n", {"id_column": "id"}, "rows 1 and 3, column 'id': both have the id '7'"),
        (b"q,a,id\nx,1,7\ny,1,\n", {"id_column": "id"}, "row 2, column 'id': the id is empty"),
        (b"q,a\nx,1\n", {"id_column": "ID"}, "has no column 'ID', only ['q', 'a']. Map it: --id_column"),
        (b"q,a,b\nx,1,2\ny,1, \n", {"prompt_template": "{question} {b}"}, "row 2, column 'b': the cell is empty"),
        (b"q,a,\nx,1,\ny,1,z\n", {}, "line 3, column 3: 'z' is in a column without a name"),
        (b"q,a\nx,\xe4\n", {}, "line 2, column 'a': not UTF-8 text"),
        ("題目,a\nx,1\n".encode("big5"), {}, "line 1: not UTF-8 text"),
        (b"q,a\nx,many\n", {"answer_format": "number"}, "column 'a': no row holds a number"),
        (b'q,a\nx,"[1]"\n', {"answer_format": "json"}, "row 1, column 'a': expected a JSON object, as text"),
    ],
)
def test_what_is_wrong_is_named_by_file_row_and_column(tmp_path, content, settings, said):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        columns_of(path, question_column="q", answer_column="a", **settings)
    assert said in str(refused.value) and "rows.csv" in str(refused.value) and "\n" not in str(refused.value)


def test_a_byte_that_is_no_text_is_named_in_json_lines_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": "\xe4"}\n')
    with pytest.raises(UserError, match="line 2, column 'answer': not UTF-8 text"):
        columns_of(path)


def test_answers_that_are_no_numbers_are_left_out_with_a_count(tmp_path):
    golds = ["3", "-2.5", "x+1", "1e3", "½", "7 "]
    rows = [{"problem": f"{n}?", "expected_answer": gold, "generated_solution": "s"} for n, gold in enumerate(golds)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(
        model="m",
        data=str(tmp_path / "rows.jsonl"),
        question_column="problem",
        answer_column="expected_answer",
        answer_format="number",
    )
    questions = load_questions(cfg, Recipe(), tiny_tokenizer())
    assert [item.columns["answer"] for item in questions.items] == ["3", "-2.5", "1e3", "7"]
    assert [item.columns["question"] for item in questions.items] == ["0?", "1?", "3?", "5?"]
    assert "4 questions kept, 0 dropped as too long, 2 dropped: answers that are no numbers;" in length_summary(
        questions
    )


# --- which questions are used


def lengths_file(folder, lengths, **more):
    """Questions of so many tokens each: letters that the tiny tokenizer knows no pairs of."""
    rows = [{"question": "Z" * n, "answer": "Z" * (n % 7 + 1), **more} for n in lengths]
    path = folder / "lengths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "lengths, limit, kept",
    [(range(10, 101, 10), 91, range(10, 91, 10)), ([5, 5, 5, 100], 71, [5, 5, 5]), ([7], 7, [7])],
)
def test_the_quantile_leaves_out_what_is_longer(tmp_path, lengths, limit, kept):
    cfg = Config(model="m", data=lengths_file(tmp_path, lengths), prompt_length_quantile=0.9)
    questions = load_questions(cfg, Recipe(), tiny_tokenizer())
    assert [len(item.token_ids) for item in questions.items] == list(kept)
    dropped = len(lengths) - len(kept)
    assert questions.drops == {f"longer than the 0.9 quantile, {limit} tokens": dropped, "too long": 0}
    assert questions.num_dropped == dropped


def test_every_filter_counts_its_own(tmp_path):
    """Quantile, then the prompt's limit, then the answer's, then the first rows; the sum is all rows."""
    cfg = Config(
        model="m",
        data=lengths_file(tmp_path, range(1, 41)),
        prompt_length_quantile=0.9,
        max_prompt_length=30,
        max_answer_length=6,
        data_rows=20,
    )
    questions = load_questions(cfg, Recipe(), tiny_tokenizer())
    assert questions.drops == {
        "longer than the 0.9 quantile, 36 tokens": 4,
        "too long": 6,
        "answers longer than 6 tokens": 4,
        "after the first 20 (data_rows)": 6,
    }
    assert [len(item.token_ids) for item in questions.items] == [n for n in range(1, 31) if n % 7 != 6][:20]
    assert [item.data_row for item in questions.items] == list(range(20))
    assert length_summary(questions).startswith("20 questions kept, 6 dropped as too long, 4 dropped: longer than the ")


def halves(path, **settings):
    cfg = Config(model="m", data=str(path), **settings)
    both = [load_questions(cfg, Recipe(), tiny_tokenizer(), held_out=side).items for side in (False, True)]
    return [[item.columns["question"] for item in items] for items in both]


def test_the_split_is_disjoint_by_question_and_decided_by_the_seed(tmp_path):
    texts = [f"{n}+{n % 5}?" for n in range(40)] + ["7+2? ", "8+3?", " 8+3?"]  # three questions are there again
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts))
    trained, held = halves(path, eval_split_size=0.25, seed=1)
    assert sorted(trained + held) == sorted(texts) and len(held) in (11, 12, 13)
    assert not {text.strip() for text in trained} & {text.strip() for text in held}
    assert [text for text in texts if text in held] == held, "in the order of the file"
    assert (trained, held) == tuple(halves(path, eval_split_size=0.25, seed=1))
    assert held != halves(path, eval_split_size=0.25, seed=2)[1]
    more = halves(path, eval_split_size=16, seed=1)[1]
    assert 16 <= len(more) <= 18 and set(held) <= set(more), "a larger part holds the smaller one"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert sorted(halves(path, eval_split_size=0.25, seed=1)[1]) == sorted(held), "whatever the order of the rows"
    sides = [set(halves(path, eval_split_size=0.25, seed=seed)[1]) for seed in range(12)]
    assert any("8+3?" in side for side in sides) and all(("8+3?" in side) == (" 8+3?" in side) for side in sides)
    with pytest.raises(UserError, match=r"0\.001 of the 43 questions of .* leaves 43 to train on and 0"):
        halves(path, eval_split_size=0.001)


# --- prompts


def test_the_example_stands_between_the_system_prompt_and_the_question():
    cfg = Config(system_prompt="S", example_question="1+1? {x}", example_answer="2", prompt_template="Q: {question}")
    tokenizer = tiny_tokenizer()
    plain = make_recipe(cfg, tokenizer)
    assert render(plain, build(plain, "2+2?", {"x": 7}), tokenizer) == "S\n1+1? {x}\n2\nQ: 2+2?"
    tokenizer.chat_template = CHAT
    chat = make_recipe(cfg, tokenizer)
    text = "<system>S</system><user>1+1? {x}</user><assistant>2</assistant><user>Q: 2+2?</user><assistant>"
    assert render(chat, build(chat, "2+2?", {}), tokenizer) == text
    given = [{"role": "user", "content": "hi"}]
    assert [turn["content"] for turn in build(chat, given, {})] == ["S", "1+1? {x}", "2", "hi"]
    assert given == [{"role": "user", "content": "hi"}], "the row stays as it is"


@pytest.mark.parametrize("rank, shown", [("0", True), ("1", False)])
def test_progress_is_shown_on_rank_0s_terminal(tmp_path, monkeypatch, rank, shown):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+{n}?", "answer": str(n)}) + "\n" for n in range(100)))
    terminal = io.StringIO()
    datasets.disable_progress_bars()
    monkeypatch.setattr("rich._console", Console(file=terminal, force_terminal=True))
    monkeypatch.setenv("RANK", rank)
    load_questions(Config(model="m", data=str(path), max_answer_length=50), Recipe(), tiny_tokenizer())
    assert ("100%" in terminal.getvalue()) == shown


def test_nothing_is_shown_off_a_terminal(tmp_path, capfd):
    datasets.disable_progress_bars()
    load_questions(settings(data=write(tmp_path, "jsonl")), Recipe(), tiny_tokenizer())
    assert capfd.readouterr().out == ""


# --- show_prompt


def test_show_prompt_prints_the_exact_text_and_touches_nothing(tmp_path, capfd):
    from grpo.config.command_line import load_config
    from grpo.run.main import run_main
    from tests.support.tiny import save_tiny

    model = save_tiny(tmp_path / "model")
    argv = [
        "--model",
        str(model),
        "--data",
        write(tmp_path, "jsonl"),
        "--question_column",
        "problem",
        "--answer_column",
        "gold",
        "--system_prompt",
        "Think.",
        "--prompt_template",
        "L{level}: {question} =",
        "--rewards",
        '{"final_answer_reward": 1}',
        "--output_dir",
        str(tmp_path / "output"),
        "--runs_dir",
        str(tmp_path / "runs"),
    ]

    def job(cfg, world):
        raise AssertionError("the job was started")

    capfd.readouterr()  # what libraries say when they are first imported
    assert run_main(job, load_config, [*argv, "--show_prompt", "1"]) == 0
    said = capfd.readouterr()
    assert said.out == "Think.\nL2: 2+2? =\n"
    count = len(tiny_tokenizer()("Think.\nL2: 2+2? =")["input_ids"])
    assert f"prompt 1: {count} tokens; gold answer '4'" in said.err
    assert not (tmp_path / "output").exists() and not (tmp_path / "runs").exists()
    assert run_main(job, load_config, [*argv, "--show_prompt", "5"]) == 2
    assert capfd.readouterr().err == "error: show_prompt: must be 0 to 4, got 5.\n"
