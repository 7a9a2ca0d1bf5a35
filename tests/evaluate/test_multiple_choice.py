"""Multiple-choice questions in a CSV: a letter or a refusal for each, through the functions of inference.py."""

import csv
import json
import shutil

import pytest

import inference
from grpo.checkpoints.manifest import write_manifest
from tests.support.launcher import fork_script
from tests.support.taught import taught_checkpoint

TEMPLATE = "{question}\nA. {選項A}\nB. {選項B}\nC. {選項C}\nD. {選項D}\nAs <answer>:\n"
ANSWERS = {
    "q1": "<answer>A</answer>",
    "q2": "hm <answer>\nb\n</answer>",
    "q3": "<answer>C</answer>",
    "q4": "<answer>D.</answer>",
    "q5": "<answer>?</answer>",
    "q6": "I am not sure, A?",
}
WANTED = {"q1": "A", "q2": "B", "q3": "C", "q4": "D", "q5": "?", "q6": "?"}
HEADER = ["ID", "Question", "Option A", "Option B", "Option C", "Option D", "", ""]


def cells(i):
    return [f"red {i}", f"blue {i}", "green", f"{i} pink"]


def lessons():
    options = ("選項A", "選項B", "選項C", "選項D")
    return [(f"Is it {i}?", dict(zip(options, cells(i))), text) for i, text in enumerate(ANSWERS.values())]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Taught with the Chinese columns of a training file."""
    folder = tmp_path_factory.mktemp("choice") / "checkpoint_1"
    sizes = ("--max_generate_length", "24", "--max_prompt_length", "96")
    return taught_checkpoint(folder, lessons(), ("--prompt_template", TEMPLATE, *sizes))


def write(path, rows, header=HEADER, encoding="utf-8-sig", newline="\r\n"):
    """A CSV file like those of spreadsheets: a byte order mark, CRLF, two columns without a name."""
    with path.open("w", encoding=encoding, newline="") as file:
        lines = csv.writer(file, lineterminator=newline)
        lines.writerows([header, *rows])
    return path


def rows():
    return [[name, f"Is it {i}?", *cells(i), "", ""] for i, name in enumerate(ANSWERS)]


def predict(checkpoint, source, out, *args):
    return inference.main(["--checkpoint", str(checkpoint), "--csv", str(source), "--out", str(out), *args])


@pytest.mark.parametrize("how", [{}, {"encoding": "utf-8", "newline": "\n"}])
def test_every_row_gets_the_models_answer(checkpoint, tmp_path, capfd, how):
    """English columns in the file, Chinese ones in the prompt: the model only answers if the prompts are the same."""
    out = tmp_path / "submission.csv"
    assert predict(checkpoint, write(tmp_path / "test.csv", rows(), **how), out, "--batch_rows", "4") == 0
    lines = out.read_bytes().decode("utf-8").split("\n")
    assert lines == ["ID,Answer", *(f"{name},{answer}" for name, answer in WANTED.items()), ""]
    out_text = capfd.readouterr().out
    assert "6 questions: A 1, B 1, C 1, D 1, refused 1, unreadable 1, not asked 0" in out_text


def test_a_question_that_does_not_fit_is_refused_and_reported(checkpoint, tmp_path, capfd):
    long = [["q7", "why " * 100, *cells(0), "", ""]]
    out = tmp_path / "s.csv"
    assert predict(checkpoint, write(tmp_path / "t.csv", long + rows()), out, "--refusal", "X") == 0
    printed = capfd.readouterr()
    assert "ID q7: not asked" in printed.err and "not asked 1" in printed.out
    assert out.read_text().splitlines()[1] == "q7,X"
    assert "q5,X" in out.read_text(), "? is no marker now: it is unreadable, and written as the marker"


def broken(change):
    table = rows()
    header = list(HEADER)
    change(table, header)
    return table, header


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda table, header: table[1].__setitem__(0, "q1"), "row 2, column 'ID': 'q1' is also that of row 1"),
        (lambda table, header: table[2].__setitem__(0, " "), "row 3, column 'ID': it is empty"),
        (lambda table, header: table[3].__setitem__(1, ""), "row 4, column 'Question': it is empty"),
        (lambda table, header: header.__setitem__(3, "Sheet"), "no column for {選項B}"),
        (lambda table, header: header.__setitem__(0, "Name"), "needs one column ID"),
        (lambda table, header: table.clear(), "questions"),
    ],
)
def test_a_bad_file_is_refused_by_row_and_column(checkpoint, tmp_path, capfd, change, error):
    table, header = broken(change)
    out = tmp_path / "s.csv"
    out.write_text("as before")
    assert predict(checkpoint, write(tmp_path / "t.csv", table, header), out) == 2
    err = capfd.readouterr().err
    assert error in err and "t.csv" in err and "Traceback" not in err
    assert out.read_text() == "as before"


@pytest.mark.parametrize(
    "args, error",
    [
        (("--csv", "t.csv"), "one needs the other"),
        (("--out", "t.csv"), "one needs the other"),
        (("--csv", "t.csv", "--out", "s.csv", "--stream"), "csv: takes no question"),
        (("--csv", "t.csv", "--out", "s.csv", "--refusal", "b"), "refusal: must be a text other than A to D"),
        (("--best", "--checkpoint", "x"), "best, checkpoint: choose one"),
        (("--best", "--output_dir", "/nowhere"), "names no checkpoint that is there"),
    ],
)
def test_flags_that_contradict(capfd, args, error):
    assert inference.main(list(args)) == 2
    assert error in capfd.readouterr().err


def test_base_and_checkpoint_are_asked_the_same(checkpoint, capfd):
    """The checkpoint compared with itself answers the same twice, also when streamed."""
    words = ["--checkpoint", str(checkpoint), "--compare", str(checkpoint), "--question", "Is it 3?"]
    assert inference.main(words) == 0
    plain = capfd.readouterr().out.splitlines()
    assert plain[0] == "❓ 问题: Is it 3?"
    assert plain[1].partition(": ")[2] == plain[2].partition(": ")[2]
    assert plain[1].startswith(f"📎 {checkpoint}: ") and plain[2].startswith("💡 回答: ")
    assert inference.main([*words, "--stream"]) == 0
    assert capfd.readouterr().out.splitlines() == plain
    assert inference.main(["--checkpoint", str(checkpoint), "--compare", "demo/base", "--json", "Is it 3?"]) == 0
    assert '"base": {"model": "demo/base"' in capfd.readouterr().out


def test_the_script_itself(checkpoint, tmp_path):
    source = write(tmp_path / "test.csv", rows())
    out = tmp_path / "submission.csv"
    done = fork_script("inference.py", "--model_dir", str(checkpoint), "--csv", str(source), "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("6 questions: ") and out.read_text().count("\n") == 7


def test_lines_are_in_the_language_of_the_checkpoints_run(checkpoint, tmp_path, capfd):
    other = shutil.copytree(checkpoint, tmp_path / "checkpoint_1")
    state = json.loads((other / "trainer" / "state.json").read_text(encoding="utf-8"))
    state["config"]["console_language"] = "zh-Hant"
    (other / "trainer" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    write_manifest(other, 1)
    assert inference.main(["--checkpoint", str(other), "Is it 3?"]) == 0
    assert capfd.readouterr().out.startswith("❓ 問題: Is it 3?\n💡 回答: ")
    assert predict(other, write(tmp_path / "test.csv", rows()), tmp_path / "out.csv") == 0
    assert "共 6 題：A 1, B 1, C 1, D 1, 拒答 1, 無法讀出 1, 未提問 0；" in capfd.readouterr().out
    assert inference._language(tmp_path) == "en"  # no checkpoint of ours
