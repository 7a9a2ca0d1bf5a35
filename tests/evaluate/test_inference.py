"""inference.py: how a question is given, and how its answer is printed, with a model that was taught what to say."""

import json
from pathlib import Path

import pytest

import inference
from grpo.evaluate.extract import split_reasoning
from tests.support.taught import taught_checkpoint

SETTINGS = ["--max_prompt_length", "96", "--max_generate_length", "64"]
LESSONS = {
    "hi there": "7, buys 3: 10.\n#### 10",
    "two lines": "first\n\nsecond\n\n \n",
    "no marks": "It is 4.",
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    lessons = [(question, {}, answer) for question, answer in LESSONS.items()]
    return taught_checkpoint(tmp_path_factory.mktemp("taught") / "checkpoint_3", lessons, SETTINGS)


def output(taught, capsys, *words, code=0):
    assert inference.main(["--checkpoint", str(taught), "--device", "cpu", *words]) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--question", "hi", "there"],
        ["--question", "hi there"],
        ["--question=hi there"],
        ["hi", "there"],
        ["hi", "--seed", "1", "there"],
        ["--question", "hi", "there", "--seed", "1"],
    ],
)
def test_all_words_are_asked(taught, capsys, words):
    assert output(taught, capsys, *words) == "❓ 问题: hi there\n💡 回答: 7, buys 3: 10.\n#### 10\n"


@pytest.mark.parametrize("words", [["hi", "--question", "there"], ["--question=hi", "there"]])
def test_a_question_given_twice_is_refused(taught, capsys, words):
    assert "question: given twice, as --question " in output(taught, capsys, *words, code=2)


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_blanks_at_the_end_of_an_answer_print_no_line(taught, capsys, how):
    assert output(taught, capsys, *how, "two lines") == "❓ 问题: two lines\n💡 回答: first\n\nsecond\n"


def test_json_has_reasoning_and_answer_apart(taught, capsys):
    expected = {
        "hi there": ("7, buys 3: 10.", "10"),
        "two lines": (None, "first\n\nsecond"),
        "no marks": (None, "It is 4."),
    }
    for question, (reasoning, answer) in expected.items():
        [line] = output(taught, capsys, "--json", question).splitlines()
        assert json.loads(line) == {
            "question": question,
            "reasoning": reasoning,
            "answer": answer,
            "text": LESSONS[question],
            "finish": "stop",
        }
    compared = json.loads(output(taught, capsys, "--json", "--compare", str(taught), "hi there"))
    assert compared["base"]["reasoning"] == "7, buys 3: 10." and compared["base"]["answer"] == "10"


@pytest.mark.parametrize(
    "text, marks, reasoning, answer",
    [
        ("<think>\na\n</think>\n<answer>\n4\n</answer>\n", "answer", "a", "4"),
        ("<reasoning>a</reasoning><answer>4</answer>", "answer", "a", "4"),
        ("a</think><answer>4</answer>", "answer", "a", "4"),  # the prompt ended with <think>
        ("<start_working_out>a<end_working_out><SOLUTION>4</SOLUTION>", "SOLUTION", "a", "4"),
        ("<answer>3</answer> no <answer>4</answer> bye", "answer", "<answer>3</answer> no", "4"),
        ("a\n#### 4\nbye", "hash", "a", "4"),
        ("#### 4", "hash", "", "4"),
        ("<think>a", "hash", None, "<think>a"),  # cut before its end
        ("<think>a</think>\n\nIt is **4**.", "hash", "a", "It is **4**."),
        ("<answer>4", "answer", None, "<answer>4"),
        ("", "answer", None, ""),
    ],
)
def test_reasoning_and_answer(text, marks, reasoning, answer):
    assert split_reasoning(text, marks) == (reasoning, answer)
