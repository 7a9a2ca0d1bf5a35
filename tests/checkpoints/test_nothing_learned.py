"""A run in which nothing is learned says so, and why; it gives no advice about disks."""

import json

import pytest

from grpo.checkpoints.background import no_gradient
from grpo.config.settings import Config
from tests.support.launcher import fork_script
from tests.support.tiny import save_tiny

REWARDS = """
def constant_reward(completions, **columns):
    return [1.0 for _ in completions]

def length_reward(completions, **columns):
    return [float(len(text)) for text in completions]
"""
SETTINGS = """
model: tiny
data: d.jsonl
prompt_template: "{question}"
chat_template: false
max_steps: 2
batch_size: 1
gradient_accumulation_steps: 1
num_generations: 4
max_prompt_length: 64
max_generate_length: 8
save_steps: 1
num_threads: 1
"""


@pytest.fixture
def train(tmp_path):
    save_tiny(tmp_path / "tiny", "qwen3")
    (tmp_path / "r.py").write_text(REWARDS)
    (tmp_path / "d.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    (tmp_path / "t.yaml").write_text(SETTINGS)

    def run(reward, *more):
        rewards = json.dumps({f"r.py:{reward}": 1.0})
        return fork_script("train.py", "--config", "t.yaml", "--rewards", rewards, *more, cwd=tmp_path)

    return run


def test_an_adapter_under_a_constant_reward_names_the_reward(train):
    """Before: 'free space or mend the folder'."""
    done = train("constant_reward", "--lora_r", "2")
    assert done.returncode == 2
    early, last = [line for line in done.stderr.splitlines() if "nothing was trained" in line]
    assert early.startswith("warning: output/checkpoint_1 is not written: ") and "training goes on" in early
    assert last.startswith("error: checkpoint: output/checkpoint_2 is not written: ")
    assert last.endswith(no_gradient(Config())) and "free space" not in done.stderr


def test_a_whole_model_under_a_constant_reward_is_saved_with_a_warning(train):
    """The control: a reward that tells completions apart causes none."""
    done = train("constant_reward")
    said = f"warning: nothing was learned in the steps from 1 to 2. {no_gradient(Config())}"
    assert done.returncode == 0 and said in done.stderr and "done: output/checkpoint_2" in done.stdout
    done = train("length_reward", "--resume", "never")
    assert done.returncode == 0 and "nothing was learned" not in done.stderr


def test_the_reason_fits_the_stage():
    assert "reward" in no_gradient(Config()) and "reward" not in no_gradient(Config(sft={"solution_column": "x"}))
