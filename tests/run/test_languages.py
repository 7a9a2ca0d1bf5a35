"""Labels in the language of the task: every language says all of it, with the same values in it."""

import string

import pytest
from rich.console import Console as RichConsole

from grpo.checkpoints.resume import FREE_TO_CHANGE
from grpo.config.command_line import load_config
from grpo.config.settings import PROJECT
from grpo.evaluate import report
from grpo.evaluate.ask import Answer
from grpo.run.completions_log import Rollout, as_markdown, as_table
from grpo.run.languages import EN, LANGUAGES, label

ROLLOUT = Rollout(10, 0, "2+2?", "4", "It is 4", "stop", {"mark_reward": None}, None, 0.5)


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {"en"}))
def test_a_language_is_whole(language):
    def fields(text):
        return sorted((name, form) for _, name, form, _ in string.Formatter().parse(text) if name)

    assert LANGUAGES[language].keys() == EN.keys()
    for key, text in LANGUAGES[language].items():
        assert fields(text) == fields(EN[key]), key
        assert key == "progress" or any("\u4e00" <= letter <= "\u9fff" for letter in text), key


@pytest.mark.parametrize(
    "language, title, words",
    [
        ("zh", "第 10 步的回答", ("问题", "标准答案", "总和 无")),
        ("zh-Hant", "第 10 步的回答", ("題目", "正確答案", "總和 無")),
        ("en", "completions of step 10", ("question", "gold", "sum none")),
    ],
)
def test_completions_are_shown_in_it(language, title, words):
    console = RichConsole(width=120, record=True)
    console.print(as_table([ROLLOUT], language))
    shown, markdown = console.export_text(), as_markdown([ROLLOUT], language)
    assert title in shown and all(word in shown for word in words)
    assert f"**{words[0]}** 2+2?" in markdown


def test_an_evaluation_speaks_it():
    rules = report.Rules("choice", "answer", "?", "zh-Hant")
    [graded] = report.grade("q", "B", [Answer("<answer>B</answer>", "stop", 1)], rules)
    assert report.Progress(1, "zh-Hant").line(graded) == "[1/1] ✅=1 | 正確率=100.00% | 預測：B | 正確答案：B"
    lines = report.final_lines([graded], rules)
    assert lines[0] == "最終正確率：100.00% (1/1)" and lines[1].startswith("嚴格擷取：100.00% (1/1)，95%")
    assert lines[3].startswith("拒答率：0.00% (0/1)；作答部分的正確率：100.00% (1/1)")


def test_the_chinese_configurations_ask_for_it():
    for name, language in (("gsm8k_zh", "zh"), ("multiple_choice", "zh-Hant"), ("gsm8k", "en")):
        cfg, _ = load_config(["--config", str(PROJECT / "configs" / f"{name}.yaml")])
        assert cfg.console_language == language
    assert "console_language" in FREE_TO_CHANGE
    assert label("en", "final", share="x") == "Final accuracy: x"
