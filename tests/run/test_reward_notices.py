"""Names of TRL, open-r1 and verl: one notice where the first completions look written for their rule, else none."""

import pytest

from grpo.config.settings import Config
from grpo.rewards.pool import open_rewards
from grpo.run.reward_notices import notices
from tests.support.launcher import fork_script
from tests.support.tiny import save_tiny

BOX, TAGGED = r"so \boxed{4}", "<answer>\n4\n</answer>"
ONE_LINE = "<think>a</think><answer>4</answer>"


def rewards_of(*names, **parameters):
    cfg = Config(rewards=dict.fromkeys(names, 1.0), reward_parameters=parameters, reward_workers=0)
    return open_rewards(cfg, print).rewards


@pytest.mark.parametrize(
    "name, texts, says",
    [
        ("accuracy_reward", [BOX, "4"], "TRL and open-r1 use this name"),
        ("accuracy_reward@first", [BOX], "boxed_math_reward reads boxes"),
        ("math_reward", [BOX], "verl uses this name"),
        ("numeric_reward", [BOX], "behind <answer>"),
        ("format_reward", [ONE_LINE], "each of its four tags on a line of its own"),
        ("format_reward", ["<think>a</think>4"], "think_format_reward"),
        ("accuracy_reward", [BOX, TAGGED], None),
        ("accuracy_reward", ["4"], None),
        ("format_reward", [ONE_LINE, "<think>\na\n</think>\n" + TAGGED], None),
        ("format_reward", ["4"], None),
        ("boxed_math_reward", [BOX], None),
    ],
)
def test_notices(name, texts, says):
    pytest.importorskip("math_verify")
    found = notices(rewards_of(name), texts)
    assert len(found) == (says is not None) and (says is None or says in found[0])


def test_other_marks_and_other_functions(tmp_path):
    [reward] = rewards_of("numeric_reward", numeric_reward={"start": "\\boxed{", "end": "}"})
    assert notices([reward], [BOX]) == []
    (tmp_path / "mine.py").write_text("def accuracy_reward(completions, **columns):\n    return [1.0]\n")
    assert notices(rewards_of(f"{tmp_path}/mine.py:accuracy_reward"), [BOX]) == []


def test_it_is_said_once(tmp_path):
    """In a run whose model writes what it likes: its text is replaced by a box, in all steps."""
    pytest.importorskip("math_verify")
    save_tiny(tmp_path / "base", "qwen3")
    start = tmp_path / "start.py"
    start.write_text(PATCHED)
    settings = {
        "model": tmp_path / "base",
        "data": "demo/train.jsonl",
        "answer_format": "hash",
        "data_rows": 8,
        "prompt_template": "{question}\n",
        "chat_template": "false",
        "max_prompt_length": 100,
        "max_steps": 2,
        "rewards": '{"accuracy_reward": 1.0}',
        "batch_size": 2,
        "num_generations": 2,
        "max_generate_length": 4,
        "device": "cpu",
        "report_to": "none",
        "output_dir": tmp_path / "output",
        "runs_dir": tmp_path / "runs",
    }
    args = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    done = fork_script(str(start), *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: accuracy_reward reads the answer behind <answer>") == 1


PATCHED = r"""
import sys
import train
from grpo.config.command_line import load_config
from grpo.run.main import run_main
from grpo.training.scoring import Scoring

plain = Scoring._input


def boxed(self, completion):
    import dataclasses
    return dataclasses.replace(plain(self, completion), completion="\\boxed{4}")


Scoring._input = boxed
sys.exit(run_main(train.train, load_config, sys.argv[1:]))
"""
