"""Folders of bare data files: which files a split is, what is refused, and that every file is looked at first."""

import json

import datasets
import pytest

from grpo.data.sources import load_rows
from grpo.errors import UserError

CARD = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train
    path: {path}
- config_name: other
  data_files: other/*.jsonl
---
# A dataset
"""


def jsonl(*words):
    return "".join(json.dumps({"question": word, "answer": "1"}) + "\n" for word in words)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([{"question": word, "answer": "1"} for word in content]).to_parquet(path)
        else:
            path.write_bytes(content.encode())
    return folder


def questions(folder, split, config=None):
    return list(load_rows(str(folder), split, config)["question"])


CSV = "question,answer\na,007\n"
TWO = {
    "train.jsonl": jsonl("a", "b"),
    "test.jsonl": jsonl("c"),
    "README.md": "# Data\n",
    "LICENSE": "MIT",
    ".git/train.jsonl": "no data",
    "notes.txt": "train",
}


@pytest.mark.parametrize(
    "files, split, config, wanted",
    [
        (TWO, "train", None, ["a", "b"]),
        (TWO, "test", None, ["c"]),
        ({"data/train.csv": CSV, "data/dev.csv": CSV}, "train", None, ["a"]),
        ({"train.csv": CSV, "val.csv": "question,answer\nb,1\n"}, "validation", None, ["b"]),
        (
            {"train/0.jsonl": jsonl("a"), "train/1.jsonl": jsonl("b"), "test/0.jsonl": jsonl("c")},
            "train",
            None,
            ["a", "b"],
        ),
        (
            {
                "data/train-00000-of-00002.parquet": ["a"],
                "data/train-00001-of-00002.parquet": ["b"],
                "data/test-00000-of-00001.parquet": ["c"],
            },
            "train",
            None,
            ["a", "b"],
        ),
        ({"mine.jsonl": jsonl("a")}, "test", None, ["a"]),  # like a plain file: all one split
        ({"main/train.jsonl": jsonl("a"), "other/train.jsonl": jsonl("b")}, "train", "other", ["b"]),
        (
            {
                "main/x.jsonl": jsonl("a"),
                "main/y.jsonl": jsonl("b"),
                "other/z.jsonl": jsonl("c"),
                "README.md": CARD.format(first="main", path="main/*.jsonl"),
            },
            "train",
            "main",
            ["a", "b"],
        ),
        (
            {
                "main/x.jsonl": jsonl("a"),
                "other/z.jsonl": jsonl("c"),
                "README.md": CARD.format(first="default", path="[main/x.jsonl]"),
            },
            "train",
            None,
            ["a"],
        ),
    ],
)
def test_a_split_is_found_by_its_name(tmp_path, files, split, config, wanted):
    assert questions(write(tmp_path, files), split, config) == wanted


def test_cells_of_csv_stay_text(tmp_path):
    folder = write(tmp_path, {"train_0.csv": "question,answer\na,007\n", "train_1.csv": "question,answer\nb,NA\n"})
    assert list(load_rows(str(folder), "train")["answer"]) == ["007", "NA"]
    (folder / "train_1.csv").write_text("answer,question\n1,b\n")
    with pytest.raises(UserError, match="parts of one split with different columns"):
        load_rows(str(folder), "train")


@pytest.mark.parametrize(
    "files, split, config, said",
    [
        (TWO, "validation", None, "has no split 'validation', only ['test', 'train']. Use --data_split"),
        ({"notes.txt": "x"}, "train", None, "holds neither a dataset of save_to_disk nor data files (.jsonl, .json"),
        ({"a.jsonl": jsonl("a"), "b.jsonl": jsonl("b")}, "train", None, "b.jsonl, and no file name names a split"),
        (
            {"train.jsonl": jsonl("a"), "train_socratic.jsonl": jsonl("b")},
            "train",
            None,
            "train.jsonl, train_socratic.jsonl, all of which may be its split 'train'. Give one of them: --data ",
        ),
        ({"train.jsonl": jsonl("a"), "train.csv": "question,answer\na,1\n"}, "train", None, "all of which may be"),
        ({"main/train.jsonl": jsonl("a"), "socratic/train.jsonl": jsonl("b")}, "train", None, "all of which may be"),
        ({"main/train.jsonl": jsonl("a")}, "train", "nope", "data_config: "),
        ({"main/train.jsonl": jsonl("a")}, "train", "../main", "data_config: "),
        ({"train-00000-of-00002.jsonl": jsonl("a")}, "train", None, "holds 1 of the 2 parts train-*-of-00002"),
        (
            {
                "main/x.jsonl": jsonl("a"),
                "other/z.jsonl": jsonl("c"),
                "README.md": CARD.format(first="main", path="main/*"),
            },
            "train",
            None,
            "has the configurations ['main', 'other']. Choose one: --data_config NAME",
        ),
        (
            {"x.jsonl": jsonl("a"), "README.md": CARD.format(first="main", path="x.jsonl")},
            "train",
            "third",
            "has the configurations ['main', 'other'], not 'third'",
        ),
        ({"x.jsonl": jsonl("a"), "README.md": "---\nconfigs: [\n---\n"}, "train", None, "README.md is not understood"),
        ({"x.jsonl": jsonl("a"), "README.md": "---\nconfigs: 3\n---\n"}, "train", None, "configs is not a list"),
        *(
            (
                {"x.jsonl": jsonl("a"), "README.md": CARD.format(first="main", path=path)},
                "train",
                "main",
                "data_files must be paths inside the folder",
            )
            for path in (
                "/etc/passwd",
                "../x.jsonl",
                "a/../../x.jsonl",
                "https://127.0.0.1/x.jsonl",
                "hf://datasets/a/b/x.jsonl",
                "'zip://x.jsonl::x.zip'",
                "~/x.jsonl",
                "{}",
                "3",
            )
        ),
    ],
)
def test_what_is_ambiguous_or_leads_elsewhere_is_one_line(tmp_path, files, split, config, said):
    write(tmp_path / "data", files)
    (tmp_path / "x.jsonl").write_text(jsonl("outside"))
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path / "data"), split, config)
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_references_in_a_card_are_not_unfolded(tmp_path):
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    card = f"---\na0: &a0 [x, x, x]\n{levels}configs:\n- config_name: *a11\n  data_files: train.jsonl\n---\n"
    write(tmp_path, {"README.md": card, "train.jsonl": jsonl("a")})
    with pytest.raises(UserError, match=r"references \(\*name\) are not read"):
        load_rows(str(tmp_path), "train")


def test_parts_are_counted_by_folder_and_name(tmp_path):
    card = '---\nconfigs:\n- config_name: all\n  data_files:\n  - split: test\n    path: "*/test-*.jsonl"\n---\n'
    files = {f"{place}/test-00000-of-00001.jsonl": jsonl(place) for place in ("a", "b")}
    write(tmp_path, {"README.md": card, **files, "b/test-best-of-5.jsonl": jsonl("c")})
    assert sorted(questions(tmp_path, "test")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "train_1.jsonl",
            b'{"question": "x", "answer": "\xff"}\n',
            "train_1.jsonl: line 1, column 'answer': not UTF-8",
        ),
        ("train_1.jsonl", b"\x1f\x8b\x08", "it is packed (gzip)"),
        ("train_1.jsonl", b"", "train_1.jsonl is empty"),
        ("train_1.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_every_file_is_looked_at_before_it_is_read(tmp_path, name, content, said):
    write(tmp_path, {"train_0.jsonl": jsonl("a"), "test.jsonl": jsonl("c")})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path), "train")
    assert said in str(caught.value), str(caught.value)
    assert questions(tmp_path, "test") == ["c"]  # a split that has nothing to do with it


def test_no_code_comes_with_a_folder(tmp_path):
    folder = write(tmp_path / "questions", {"train.jsonl": jsonl("a")})
    (folder / "questions.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert questions(folder, "train") == ["a"]
    assert not (tmp_path / "ran").exists()
