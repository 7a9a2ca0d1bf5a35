"""Data files of unknown origin: questions or one line, never anything else, and nothing in them is ever run.

The fuzz mutates valid files and reads them through `load_questions`, as training does. Chance cannot pass it: a
mutation may only end in questions that are text with an answer, or in a UserError that names the file.
"""

import gzip
import json
import logging
import random
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo.config.settings import Config, total_steps
from grpo.data.questions import Questions, load_questions
from grpo.data.recipe import Recipe
from grpo.data.sources import load_rows
from grpo.errors import UserError
from tests.support.tiny import tiny_tokenizer

ROWS = [{"question": f"{n}+{n}? 苹果", "answer": f"so {2 * n}\n#### {2 * n}", "level": n} for n in range(1, 9)]
KINDS = ("jsonl", "json", "csv", "parquet")
TOKENIZER = tiny_tokenizer()
SHORT, FULL = 160, 2400


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)


def valid_bytes(kind, folder):
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if kind == "json":
        return json.dumps(ROWS, indent=1).encode()
    path = folder / f"valid.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(str(path)) if kind == "csv" else table.to_parquet(str(path))
    return path.read_bytes()


def mutate(content, kind, rng):
    """One of many ways to spoil a file. Returns its name and the bytes."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(content))
    text = content.decode("utf-8", "replace")
    swaps = {
        "a NaN": (b"1}", b"NaN}"),
        "1e999": (b"1}", b"1e999}"),
        "nested answer": (b'"so 2', b'{"a": [1]}, "x": "so 2'),
        "number as question": (b'"1+1? ', b'17, "x": "'),
        "null question": (b'"1+1? ', b'null, "x": "'),
        "half a surrogate": (b"1+1?", b"1+1?\\ud800"),
        "NUL": (b"1+1?", b"1+\x001?"),
        "quote": (b"1+1?", b'1+"1?'),
        "comma": (b"1+1?", b"1,+,1,?"),
        "deep": (b"1}", b"[" * 4000 + b"]" * 4000 + b"}"),
        "huge number": (b"1}", b"9" * 5000 + b"}"),
        "key twice": (b'"level"', b'"question"'),
        "column renamed": (b"answer", b"gold"),
        "column emptied": (b"answer", b""),
    }
    ways = {
        "flip a bit": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        "flip ten bytes": lambda: bytes(b if rng.random() > 10 / len(content) else rng.randrange(256) for b in content),
        "cut": lambda: content[:at],
        "cut the start": lambda: content[at:],
        "insert": lambda: content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:],
        "lines twice": lambda: b"".join(line * rng.randrange(3) for line in lines),
        "lines merged": lambda: content.replace(b"\n", b"", rng.randrange(1, 5)),
        "lines shuffled": lambda: b"".join(rng.sample(lines, len(lines))),
        "latin-1": lambda: text.replace("苹果", "äpfel").encode("latin-1", "replace"),
        "utf-16": lambda: text.encode("utf-16", "replace"),
        "BOM": lambda: b"\xef\xbb\xbf" + content,
        "gzip": lambda: gzip.compress(content),
        "gzip magic": lambda: b"\x1f\x8b" + content[2:],
        "CR only": lambda: content.replace(b"\r\n", b"\n").replace(b"\n", b"\r"),
        "two files in one": lambda: content + content,
        **{name: lambda swap=swap: content.replace(*swap, rng.randrange(1, 3)) for name, swap in swaps.items()},
    }
    name = rng.choice(sorted(ways))
    return name, ways[name]()


def outcome(path):
    """valid or refused; anything else is raised."""
    cfg = Config(data=str(path), answer_format="hash", rewards={"r": 1.0}, model="m")
    try:
        questions = load_questions(cfg, Recipe(max_prompt_length=10**6), TOKENIZER)
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error), str(error)
        assert error.code == 2
        return "refused"
    assert questions.items
    for item in questions.items:
        assert item.text.strip() and item.token_ids and item.columns["answer"].strip()
    return "valid"


@pytest.mark.parametrize("count", [SHORT, pytest.param(FULL, marks=pytest.mark.full)])
def test_mutated_files_give_questions_or_one_line(tmp_path, count, capfd):
    rng = random.Random(11)
    table = {kind: {"tried": 0, "refused": 0, "valid": 0} for kind in KINDS}
    originals = {kind: valid_bytes(kind, tmp_path) for kind in KINDS}
    for kind, content in originals.items():
        path = tmp_path / f"original.{kind}"
        path.write_bytes(content)
        assert outcome(path) == "valid", "the control: nothing was mutated"
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        name, content = mutate(originals[kind], kind, rng)
        path = tmp_path / f"rows{i}.{kind}"
        path.write_bytes(content)
        try:
            result = outcome(path)
        except BaseException as error:
            raise AssertionError(f"mutation {i}, {name} of {kind}: {type(error).__name__}: {error}") from error
        table[kind]["tried"] += 1
        table[kind][result] += 1
        path.unlink()
    said = capfd.readouterr()
    assert said.err == "" and said.out == "", "libraries talked"
    show(table)
    assert all(row["refused"] >= row["tried"] / 5 and row["valid"] > 0 for row in table.values())


def show(table):
    """The counts, under -s."""
    print(f"\n{'kind':28}{'tried':>8}{'refused':>9}{'valid':>7}{'other':>7}")
    for kind, row in table.items():
        print(f"{kind:28}{row['tried']:8}{row['refused']:9}{row['valid']:7}{0:7}")


@pytest.mark.parametrize(
    "content, said",
    [
        (
            b'{"question": "1?", "answer": "1"}\n{"question": NaN, "answer": "1"}\n',
            "line 2: not valid JSON: NaN is not a JSON number",
        ),
        (b'{"question": "1?", "answer": "1", "x": 1e999}\n', "line 1: not valid JSON"),
        (b'{"question": "1?", "answer": "\\ud800"}\n', "line 1, column 'answer': character 1 is half of a surrogate"),
        (b'{"question": "1?", "question": "2?"}\n', "line 1: not valid JSON: the key 'question' occurs twice"),
        (b'{"question": "1?", "answer": {"a": 1}}\n', "row 1, column 'answer': expected a gold answer, got"),
        (b'{"question": "1?", "answer": [1, 2]}\n', "row 1, column 'answer': expected a gold answer"),
        (b'{"question": {"a": "1"}, "answer": "1"}\n', "row 1, column 'question': expected a question"),
        (b'{"question": [{"role": "user", "content": ["a"]}], "answer": "1"}\n', "column 'question': expected a q"),
        (
            b'{"question": "1?", "answer": "1"}\r{"question": "2?", "answer": "2"}\r',
            "line 1: not valid JSON: Extra data",
        ),
        (b"\xff\xfe1\0", "not UTF-8 text"),
        (b"\x1f\x8b\x08\0", "packed (gzip)"),
        (b"PK\x03\x04zip", "packed (zip)"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a": ' * 10**5, "line 1: not valid JSON: it is nested too deeply"),
        (b"17\n", "line 1: expected an object, got 17"),
        (b'{"question": "1?", "answer": ' + b"9" * 30 + b"}\n", "beyond 64 bits"),
    ],
)
def test_what_is_wrong_with_a_jsonl_file(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    cfg = Config(data=str(path), rewards={"r": 1.0}, model="m")
    with pytest.raises(UserError) as refused:
        load_questions(cfg, Recipe(), TOKENIZER)
    assert said in str(refused.value) and "rows.jsonl" in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"question,answer\n1?,1,2\n", "line 2: 3 cells under 2 columns"),
        (b"question,question\n1?,1\n", "line 1: its column names must be different"),
        (b'question,answer\n"1?,1\n', "line 2: unexpected end of data"),
        (b"question,answer\n1\x00?,1\n", "holds a NUL character"),
        (b"question,answer\n" + b"x" * (2**24 + 2), "longer than"),
        ("question,answer\nä,1\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_csv_file(tmp_path, content, said):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_rows(str(path), "train")
    assert said in str(refused.value), str(refused.value)


def test_a_line_of_50_mb_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "' + b"x" * 50_000_000 + b'"}\n')
    tracemalloc.start()
    with pytest.raises(UserError, match="line 1: longer than 16777216 bytes"):
        load_rows(str(path), "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000, peak


def test_parquet_that_brings_code_or_bad_text(tmp_path, monkeypatch):
    """A pickled column type (its canary), text that is no UTF-8, and few bytes that stand for very many."""
    canary = tmp_path / "canary"
    pickled = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    field = pa.field(
        "question",
        pa.string(),
        metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled},
    )
    bad_text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    big = pa.table({"question": pa.array(["x" * 2**20] * 200)})
    tables = {
        "a type of its own": pa.table({"question": ["1?"]}, schema=pa.schema([field])),
        "UTF8": pa.table({"question": bad_text}),
        "when decoded": big,
    }
    monkeypatch.setattr("grpo.data.file_checks.MAX_PARQUET_BYTES", 2**26)
    for said, table in tables.items():
        path = tmp_path / "rows.parquet"
        pq.write_table(table, path, compression="zstd")
        with pytest.raises(UserError, match=said):
            load_rows(str(path), "train")
    assert not canary.exists()


def hostile_folders(folder, canary):
    """Saved datasets, each spoiled in one way; and folders that are none, with a script."""
    script = f"import os\nos.system('touch {canary}')\n"

    def edit(name, **values):
        def spoil(path):
            facts = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps({**facts, **values}))

        return spoil

    def write(name, text):
        return lambda path: (path / name).write_text(text)

    def cut_arrow(path):
        [file] = path.glob("*.arrow")
        file.write_bytes(file.read_bytes()[:200])

    return {
        "points outside": edit("state.json", _data_files=[{"filename": "../other/data.arrow"}]),
        "absolute": edit("state.json", _data_files=[{"filename": "/etc/passwd"}]),
        "no files": edit("state.json", _data_files=[]),
        "of the wrong kind": edit("state.json", _data_files="data.arrow"),
        "unknown format": edit("state.json", _format_type="evil"),
        "not JSON": write("state.json", "{"),
        "NaN": write("dataset_info.json", '{"features": NaN}'),
        "deep": write("dataset_info.json", "[" * 10**5),
        "unknown feature": edit("dataset_info.json", features={"question": {"_type": "os.system", "dtype": "x"}}),
        "splits elsewhere": write("dataset_dict.json", '{"splits": ["../../etc"]}'),
        "half an arrow file": cut_arrow,
        "script only": lambda path: (
            [f.unlink() for f in path.iterdir()] and (path / f"{path.name}.py").write_text(script)
        ),
    }


def test_hostile_folders(tmp_path, capfd):
    canary = tmp_path / "canary"
    table = {"saved folders": {"tried": 0, "refused": 0, "valid": 0}}
    for name, spoil in hostile_folders(tmp_path, canary).items():
        path = tmp_path / name.replace(" ", "_")
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
        (path / f"{path.name}.py").write_text(f"import os\nos.system('touch {canary}')\n")
        assert len(load_rows(str(path), "train")) == len(ROWS), "the control: a script beside it changes nothing"
        spoil(path)
        with pytest.raises(UserError):
            load_rows(str(path), "train")
        table["saved folders"]["tried"] += 1
        table["saved folders"]["refused"] += 1
    (tmp_path / "evil.py").write_text(f"import os\nos.system('touch {canary}')\n")
    with pytest.raises(UserError, match="unknown file type"):
        load_rows(str(tmp_path / "evil.py"), "train")
    assert not canary.exists()
    capfd.readouterr()
    show(table)


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.full)])
def test_spoiled_arrow_files_of_a_saved_folder(tmp_path, count):
    """Arrow files are mapped, not parsed: a wrong offset would be followed if it were not looked at first."""
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    [file] = folder.glob("*.arrow")
    content, rng = file.read_bytes(), random.Random(5)
    table = {"arrow": {"tried": 0, "refused": 0, "valid": 0}}
    for _ in range(count):
        spoiled = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        file.write_bytes(spoiled)
        table["arrow"]["tried"] += 1
        table["arrow"][outcome(folder)] += 1
    show(table)
    assert table["arrow"]["refused"] > 0 and table["arrow"]["valid"] > 0


def test_features_that_would_open_other_files_stay_as_they_are(tmp_path):
    """An Image column names a path: read as bytes and path, never opened."""
    rows = [{"question": "1?", "picture": {"path": "http://127.0.0.1:9/x.png", "bytes": None}}]
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "picture": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    info["features"]["picture"] = {"_type": "Image"}
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    [row] = load_rows(str(tmp_path / "d"), "train")
    assert row["picture"] == {"path": "http://127.0.0.1:9/x.png", "bytes": None}
    with pytest.raises(Exception):  # noqa: B017  the control: datasets alone tries to open it
        datasets.load_from_disk(str(tmp_path / "d"))[0]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 8, 9])
def test_datasets_of_odd_size_deal_every_row_once_an_epoch(num_rows):
    """P = 4 prompts a step, 2 epochs: ceil(2 rows / P) steps; the multiset that is dealt is whole epochs and a rest."""
    cfg = Config(batch_size=2, gradient_accumulation_steps=2, epoch=2)
    questions = Questions(list(range(num_rows)), 0, seed=5)
    steps = total_steps(cfg, num_rows)
    dealt = [row for step in range(steps) for row in questions.prompts(step, 4)]
    assert 2 * num_rows <= len(dealt) < 2 * num_rows + 4
    counts = [dealt[: 2 * num_rows].count(row) for row in range(num_rows)]
    assert counts == [2] * num_rows


@pytest.mark.parametrize("kind, content", [("jsonl", b"\n\n"), ("json", b"[]"), ("csv", b"question,answer\n")])
def test_a_file_without_rows_is_refused(tmp_path, kind, content):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    assert outcome(path) == "refused"


ODD_TEXTS = ["a", " 苹果 ", "‮right to left‬ שלום", "a\0b", "<|endoftext|>", "\x7f\x01", "e\u0301", "\ufeffx", "🍐" * 50]


def test_odd_questions_are_tokens_within_the_vocabulary_or_left_out(tmp_path):
    """One character, right to left, NUL, special tokens as text, beyond the limit: dealt as they are, or counted."""
    path = tmp_path / "rows.jsonl"
    texts = [*ODD_TEXTS, "long " * 500]
    path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts))
    cfg = Config(data=str(path), rewards={"r": 1.0}, model="m", max_prompt_length=600)
    questions = load_questions(cfg, Recipe(), TOKENIZER)
    assert [item.text for item in questions.items] == ODD_TEXTS and questions.num_dropped == 1
    ids = [i for item in questions.items for i in item.token_ids]
    assert min(ids) >= 0 and max(ids) < len(TOKENIZER)
    assert len(questions.items[0].token_ids) == 1
